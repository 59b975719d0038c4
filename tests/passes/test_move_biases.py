"""Biases of fp8 linears: added by the op that reads the product, with the numbers that they had."""

from dataclasses import replace

import torch

from tritium import ops
from tritium.compiled import Compiled, compile_module
from tritium.config import BuildConfig
from tritium.models.create import create
from tritium.models.presets import preset
from tritium.ops.fp8 import quantize_fp8
from tritium.weights.recipes import Checkpoint, Slice, leaves


def compiled(arch: str) -> Compiled:
    config = preset(arch, dtype="bfloat16", max_model_len=64)
    small = replace(config, num_layers=3, windows=(0, 0, 0), vocab_size=256)
    return compile_module(create(small), BuildConfig(scheme="fp8", device="cuda"))


def test_gpt_j_adds_its_biases_in_the_activation_and_in_the_next_norm() -> None:
    model = compiled("gpt-j-6b")
    steps = model.plan.steps
    left = [step.args["bias"] for step in steps if step.op == "linear_fp8"]
    assert [bias.value for bias in left if bias is not None] == [f"layers.{i}.mlp.down_proj.bias" for i in (1, 2)]
    taken = [step.args["bias"].value for step in steps if step.op == "activation_pair_fp8"]
    trees = [model.weights.get(name, Checkpoint(name)) for name in taken]
    assert [leaf.name for tree in trees for leaf in leaves(tree)] == [f"layers.{i}.mlp.up_proj.bias" for i in range(3)]
    assert [isinstance(tree, Slice) for tree in trees] == [True, True, False]  # the last layer's is a linear by itself
    biases = [step.args["x_bias"].value for step in steps if step.op == "add_layer_norm_fp8"]
    assert biases == ["layers.0.mlp.down_proj.bias"]


def test_a_bias_that_a_rotation_reads_stays() -> None:
    biased = [step.args["bias"] is not None for step in compiled("qwen2.5-0.5b").plan.steps if step.op == "linear_fp8"]
    assert biased == [True, False, False, False] * 3


def test_the_ops_that_take_a_bias_add_it_once() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 32).to(torch.bfloat16)
    bias, weight = torch.randn(2, 32).to(torch.bfloat16)
    expected = quantize_fp8(ops.activation((x.float() + bias.float()), "gelu_tanh"))
    assert all(map(torch.equal, torch.ops.tritium.activation_fp8(x, bias, "gelu_tanh"), expected))
    beside = quantize_fp8(torch.cat((residual.float(), ops.activation(x.float() + bias.float(), "gelu_tanh")), -1))
    assert all(map(torch.equal, torch.ops.tritium.activation_pair_fp8(residual, x, bias, "gelu_tanh"), beside))
    rows, scales, total = torch.ops.tritium.add_layer_norm_fp8(x, residual, bias, weight, None, 1e-5)
    assert torch.equal(total, (x.float() + residual.float() + bias.float()).to(torch.bfloat16))
    normed = torch.nn.functional.layer_norm(total.float(), (32,), weight.float())
    assert ((rows.float() * scales - normed).abs() <= normed.abs() / 16 + 0.02).all()
