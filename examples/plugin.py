"""A plugin: a fused op of your own, found in models by its spellings, with a kernel in C++ and one in torch."""

import ctypes
import tempfile

import torch

from tritium import LLM, Plugin, SamplingParams, build
from tritium.kernels.cpu.extension import Extension
from tritium.kernels.kernel import Kernel
from tritium.models import MLP, DecoderBlock, create
from tritium.models.decoder import Decoder
from tritium.models.hf_config import parse_config
from tritium.models.presets import PRESETS
from tritium.ops import Op, Spelling
from tritium.ops.op import like_first
from tritium.runtime.step_times import StepTimer

CPP = Extension("""
#include "tritium.h"
using namespace tritium; struct Args { const void* x; void* out; int64_t num_rows, stride, size; };
template <class T> void hard_swish(const Args& a) {
  for_rows(a.num_rows, a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride; T* out = static_cast<T*>(a.out) + row * a.size;
    for_vectors(a.size, [&](int64_t i, int64_t count) {
      f32x16 v = load(x + i, count), up = v + 3.0f, gate = up < 0.0f ? splat(0.0f) : up;
      store(out + i, v * (gate > 6.0f ? splat(6.0f) : gate) / 6.0f, count);
    }); });
} TRITIUM_EXPORT(hard_swish, Args)""")


class Args(ctypes.Structure):  # as in C++
    _fields_ = [(n, ctypes.c_void_p) for n in ("x", "out")] + [(n, ctypes.c_int64) for n in ("rows", "stride", "size")]


def bind_cpp(args, outputs):
    x, out = args["x"], outputs[0]
    sizes = Args(x.data_ptr(), out.data_ptr(), x.shape[0], x.stride(0), x.shape[1])
    return CPP.thunk("hard_swish", x.dtype, sizes, x, out)


def supports_cpp(args):
    return CPP.refuse({"x": args["x"]}) or (None if len(args["x"].shape) == 2 else "x must have two dimensions")


def bind_eager(args, outputs):
    return lambda: outputs[0].copy_(hard_swish(args["x"].float()))


def hard_swish(x):
    return x * torch.clamp(x + 3.0, 0.0, 6.0) / 6.0


class HardSwishMLP(MLP):
    def forward(self, x):
        return self.down_proj(hard_swish(self.up_proj(x)))


Block = type("Block", (DecoderBlock,), {"mlp_class": HardSwishMLP})
SPELLING = Spelling(name="clamp", fn=hard_swish, example=lambda dtype: (torch.randn(8, 48, dtype=dtype),))
MEANS = {"reference": lambda x: hard_swish(x.float()).to(x.dtype), "fake": like_first, "spellings": (SPELLING,)}
CPP_ROW = {"backend": "cpu", "target": f"{__name__}:bind_cpp", "supports": f"{__name__}:supports_cpp"}
EAGER_ROW = {"backend": "eager", "target": f"{__name__}:bind_eager"}
ROWS = tuple(Kernel(name=f"primer.{r['backend']}", op="hard_swish", **r) for r in (CPP_ROW, EAGER_ROW))
OP = Op(name="hard_swish", schema="hard_swish(Tensor x) -> Tensor", **MEANS)
PLUGIN = Plugin(name="primer", ops=(OP,), kernels=ROWS)

if __name__ == "__main__":
    config = parse_config(PRESETS["gpt2"] | {"n_layer": 4}, "gpt2", dtype="float32", max_model_len=512)
    model = create(config, type("HardSwishDecoder", (Decoder,), {"block_class": Block}))
    tokens, params = [], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for plugins in ([], [PLUGIN]):
        with tempfile.TemporaryDirectory() as place:
            engine = build(model, weights="dummy", plugins=plugins, output_dir=f"{place}/engine")
            ms = sum(StepTimer(engine).prefill(256)) * 1e3
            print(f"{len(plugins)} plugins: {len(engine.plan.steps)} steps, {ms:.2f} ms a prompt of 256")
            with LLM(engine.path, plugins=plugins) as llm:
                tokens.append(llm.generate([5] * 99, params)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1], "the same model"
