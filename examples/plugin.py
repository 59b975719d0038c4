"""A plugin: a fused op of your own, found in models by its spellings, with a kernel in C++ and one in torch."""

import ctypes
import tempfile

import torch
from custom_model import SquaredReluDecoder

from tritium import LLM, Plugin, SamplingParams, build
from tritium.kernels.cpu.extension import Extension
from tritium.kernels.kernel import Kernel
from tritium.models import create
from tritium.models.hf_config import parse_config
from tritium.models.presets import PRESETS
from tritium.ops import Op, Spelling
from tritium.ops.op import like_first
from tritium.runtime.step_times import StepTimer

CPP = Extension("""
#include "tritium.h"
using namespace tritium;
struct Args { const void* x; void* out; int64_t num_rows, stride, size; };
template <class T> void squared_relu(const Args& a) {
  for_rows(a.num_rows, a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride;
    T* out = static_cast<T*>(a.out) + row * a.size;
    for_vectors(a.size, [&](int64_t i, int64_t count) {
      f32x16 v = load(x + i, count);
      v = v < 0.0f ? splat(0.0f) : v;
      store(out + i, v * v, count);
    });
  });
}
TRITIUM_EXPORT(squared_relu, Args)
""")


class Args(ctypes.Structure):  # as in C++
    _fields_ = [(n, ctypes.c_void_p) for n in ("x", "out")] + [(n, ctypes.c_int64) for n in ("rows", "stride", "size")]


def bind_cpp(args, outputs):
    x, out = args["x"], outputs[0]
    struct = Args(x.data_ptr(), out.data_ptr(), x.shape[0], x.stride(0), x.shape[1])
    return CPP.thunk("squared_relu", x.dtype, struct, x, out)


def supports_cpp(args):
    return CPP.refuse({"x": args["x"]}) or (None if len(args["x"].shape) == 2 else "x must have two dimensions")


def bind_eager(args, outputs):
    return lambda: torch.square(torch.relu(args["x"]), out=outputs[0])


EXAMPLE = {"example": lambda dtype: (torch.randn(8, 48, dtype=dtype),)}
TIMES = Spelling(name="times", fn=lambda x: (h := torch.relu(x)) * h, **EXAMPLE)
SQUARE = Spelling(name="square", fn=lambda x: torch.relu(x) ** 2, **EXAMPLE)
MEANS = {"reference": lambda x: torch.relu(x).square(), "fake": like_first, "spellings": (TIMES, SQUARE)}
CPP_ROW = {"backend": "cpu", "target": f"{__name__}:bind_cpp", "supports": f"{__name__}:supports_cpp"}
EAGER_ROW = {"backend": "eager", "target": f"{__name__}:bind_eager"}
ROWS = tuple(Kernel(name=f"primer.{r['backend']}", op="squared_relu", **r) for r in (CPP_ROW, EAGER_ROW))
OP = Op(name="squared_relu", schema="squared_relu(Tensor x) -> Tensor", **MEANS)
PLUGIN = Plugin(name="primer", ops=(OP,), kernels=ROWS)

if __name__ == "__main__":
    config = parse_config(PRESETS["gpt2"] | {"n_layer": 4}, "gpt2", dtype="float32", max_model_len=512)
    model = create(config, SquaredReluDecoder)
    tokens, params = [], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for plugins in ([], [PLUGIN]):
        with tempfile.TemporaryDirectory() as place:
            engine = build(model, weights="dummy", plugins=plugins, output_dir=f"{place}/engine")
            times = zip(engine.plan.steps, StepTimer(engine).prefill(256), strict=True)
            ours = [s for step, s in times if step.op in ("activation", "aten.mul.Tensor", "primer.squared_relu")]
            print(f"{len(plugins)} plugins: {len(ours)} steps for relu(x)², {sum(ours) * 1e3:.2f} ms a prompt of 256")
            with LLM(engine.path, plugins=plugins) as llm:
                tokens.append(llm.generate([5] * 99, params)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1], "the same model"
