"""Plugins: what they may say, what a build makes of them, and what an engine says when one is absent."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from tritium import LLM, Plugin, SamplingParams, ops
from tritium.build_child import build_in_child
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError
from tritium.kernels.kernel import Kernel
from tritium.kernels.plugin import load_plugins
from tritium.ops.op import Op, Spelling, like_first
from tritium.testing.plain_models import PlainLlama

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def spelled_in_ops(gate, up, *, factor):
    return ops.gated_activation(gate, up, "silu") * factor


def bind_scaled_glu(args, outputs):
    return lambda: outputs[0].copy_(ops.gated_activation(args["gate"], args["up"], "silu") * args["factor"])


def bind_linear(args, outputs):
    return lambda: outputs[0].copy_(torch.nn.functional.linear(args["x"], args["weight_NK"], args.get("bias")))


def gate_up(dtype):
    return torch.randn(8, 48, dtype=dtype), torch.randn(8, 48, dtype=dtype)


OP = Op(
    name="scaled_glu",
    schema="scaled_glu(Tensor gate, Tensor up, float factor=1.0) -> Tensor",
    reference=lambda gate, up, factor=1.0: ops.gated_activation(gate, up, "silu") * factor,
    fake=like_first,
    spellings=(Spelling(name="ops", fn=spelled_in_ops, example=gate_up, attributes={"factor": 0.7654321}),),
)
ROW = Kernel(name="mine.glu", op="scaled_glu", backend="eager", target=f"{__name__}:bind_scaled_glu")
PLUGIN = Plugin(name="mine", ops=(OP,), kernels=(ROW,))
LINEAR = Plugin(
    name="lin", kernels=(Kernel(name="lin.torch", op="linear", backend="cpu", target=f"{__name__}:bind_linear"),)
)


class Scaled(nn.Module):
    """A PlainLlama whose gated products are scaled: written in plain torch, not in our ops."""

    def __init__(self):
        super().__init__()
        self.model = PlainLlama()
        for layer in self.model.layers:
            layer.forward = _scaled_forward.__get__(layer)

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)


def _scaled_forward(self, x_TD, cos_TH, sin_TH):
    gate, up = self.gate(x_TD), self.up(x_TD)
    q = self.q(x_TD).view(x_TD.shape[0], -1, self.head_size).transpose(0, 1)[None]
    a = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    x_TD = x_TD + self.o(a[0].transpose(0, 1).reshape(x_TD.shape[0], -1))
    return x_TD + self.down(nn.functional.silu(gate) * up * 0.5)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    torch.manual_seed(0)
    root, model = tmp_path_factory.mktemp("engines"), Scaled()
    return {
        name: build(model, output_dir=root / name, max_model_len=64, plugins=plugins).path
        for name, plugins in {"without": [], "with": [PLUGIN], "kernel": [LINEAR, PLUGIN]}.items()
    }


def tokens(path, plugins=()):
    with LLM(path, plugins=plugins, **LIMITS) as llm:
        return llm.generate([3, 5, 7, 11], GREEDY)[0].outputs[0].token_ids


def test_a_plugins_op_is_found_where_a_spelling_stands_with_its_attributes_and_runs(engines):
    plan = Engine.load(engines["with"], plugins=[PLUGIN]).plan
    found = [step for step in plan.steps if step.op == "mine.scaled_glu"]
    assert len(found) == 2
    assert {(step.kernel, step.args["factor"]) for step in found} == {("mine.glu", 0.5)}
    assert not any(step.op == "gated_activation" for step in plan.steps)
    assert tokens(engines["with"], [PLUGIN]) == tokens(engines["without"])


def test_a_plugin_may_bring_a_kernel_for_an_op_of_tritium(engines):
    engine = Engine.load(engines["kernel"], plugins=[LINEAR, PLUGIN])
    assert {step.kernel for step in engine.plan.steps if step.op == "linear"} == {"lin.torch"}
    assert tokens(engines["kernel"], [PLUGIN, LINEAR]) == tokens(engines["without"])


def test_an_engine_names_its_plugins_and_is_refused_without_them(engines):
    assert Engine.load(engines["with"], plugins=[PLUGIN]).manifest.plugins == {"mine": "1"}
    assert Engine.load(engines["without"]).manifest.plugins == {}
    with pytest.raises(EngineError, match=r"built with the plugin 'mine', version 1, which was not given: pass it"):
        Engine.load(engines["with"])
    newer = dataclasses.replace(PLUGIN, version="2")
    with pytest.raises(EngineError, match=r"version 1 of plugin 'mine', given is 2: give that version"):
        Engine.load(engines["with"], plugins=[newer])


def test_a_plugin_that_no_step_needs_is_not_asked_for_later(engines, tmp_path):
    engine = build(PlainLlama(), output_dir=tmp_path / "e", max_model_len=16, plugins=[PLUGIN])
    assert engine.manifest.plugins == {}


def test_nothing_stays_registered_after_a_build_and_a_second_one_is_like_the_first(engines, tmp_path):
    assert not hasattr(torch.ops, "tritium_plugin_mine") or not hasattr(torch.ops.tritium_plugin_mine, "scaled_glu")
    again = build(Scaled(), output_dir=tmp_path / "again", max_model_len=64, plugins=[PLUGIN])
    assert (again.path / "plan.json").read_bytes() == (engines["with"] / "plan.json").read_bytes()


def test_opening_an_engine_imports_no_plugin(engines, tmp_path):
    script = (
        "import sys\nfrom tritium import Engine\nfrom tritium.errors import EngineError\nbefore = set(sys.modules)\n"
        "try:\n    Engine.load(sys.argv[1])\nexcept EngineError as error:\n    assert \"'mine'\" in str(error)\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith(('tritium', 'torch', 'numpy'))}\n"
        "assert not [m for m in sys.modules if 'plugin' in m and m != 'tritium.kernels.plugin'], new\n"
    )
    done = subprocess.run([sys.executable, "-c", script, engines["with"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plugin_is_named_or_given_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "my_kernels.py").write_text("from tritium import Plugin\nPLUGIN = Plugin(name='p')\nOTHER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugins(["my_kernels:PLUGIN", PLUGIN])[0].name == "p"
    for wrong, words in {
        "my_kernels": "must be a Plugin or 'module:name'",
        "my_kernels:NONE": "cannot be loaded: module 'my_kernels' has no attribute 'NONE'",
        "no_such_module:X": "cannot be loaded: No module named 'no_such_module'. Is it installed, or on PYTHONPATH?",
        "my_kernels:OTHER": "is a int, not a tritium.Plugin",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_plugins([wrong])
    with pytest.raises(ConfigError, match="two are named 'mine'"):
        load_plugins([PLUGIN, PLUGIN])
    with pytest.raises(ConfigError, match="must be a list"):
        load_plugins("my_kernels:PLUGIN")
    with pytest.raises(ConfigError, match=r"plugin 'mine' is an object, .* name it as 'module:name', or build"):
        build_in_child("model", BuildConfig(), tmp_path, plugins=[PLUGIN])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "My Plugin"}, "must be a lower-case identifier, not 'My Plugin'"),
        ({"name": "cpu"}, "cannot be named 'cpu'"),
        ({"name": "p", "kernels": (ROW,)}, r"kernel 'mine.glu' must be named 'p\.<something>'"),
        ({"name": "mine", "kernels": (ROW,)}, r"implements 'scaled_glu', which is neither .*it has none.* rms_norm"),
        ({"name": "mine", "ops": (OP,)}, "op 'scaled_glu' has no kernel: add a row"),
        ({"name": "mine", "ops": (OP, OP), "kernels": (ROW,)}, "are named 'scaled_glu'"),
        ({"name": "p", "ops": (dataclasses.replace(OP, name="rope"),)}, "are named 'rope'"),
    ],
)
def test_what_a_plugin_gets_wrong_is_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        Plugin(**fields)
