"""The quantize pass: which linears it takes, what recipes it leaves, and what the engine then computes."""

import pytest
import torch
from torch import nn

from tritium.compiled import compile_module
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.recipe_file import read_recipes
from tritium.errors import CaptureError, ConfigError
from tritium.ops.quantized import dequantize_weight
from tritium.quant.schemes import WeightFormat
from tritium.testing.plain_models import PlainLlama
from tritium.weights.recipe_json import from_json, to_json
from tritium.weights.recipes import Checkpoint, Concat, Quantized, Scales, describe, leaves
from tritium.weights.safetensors import SafetensorsSource

G32 = WeightFormat("int4", 32)
SCHEMES = ("w8a8", "w8a16", "w4a16_g128", "w4a8_g32", "w4a8_g128")


def model() -> nn.Module:
    torch.manual_seed(0)
    return PlainLlama(size=128, num_heads=4, intermediate=288)


def steps(config: BuildConfig) -> dict[str, list]:
    plan = compile_module(model(), config).plan
    return {op: [step for step in plan.steps if step.op == op] for op in ("linear", "quantized_linear")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_is_quantised_with_the_head_in_8_bits(scheme: str) -> None:
    found = steps(BuildConfig(scheme=scheme))
    assert not found["linear"] and {s.kernel for s in found["quantized_linear"]} == {"cpu.quantized_linear"}
    names = [step.args["qweight"].value for step in found["quantized_linear"]]
    assert names[-1].endswith(".int8") and (scheme[:2] == "w8") == all(n.endswith(".int8") for n in names)
    assert {s.args["int8_activations"] for s in found["quantized_linear"]} == {"a8" in scheme}


def test_inputs_that_no_group_divides_take_8_bits() -> None:
    names = [s.args["qweight"].value for s in steps(BuildConfig(scheme="w4a8_g128"))["quantized_linear"]]
    assert all(name.endswith(".int8") for name in names if "down" in name)  # 288 inputs
    assert any(name.endswith(".int4") for name in names)


def test_tensors_that_are_left_out_stay_and_their_merged_linear_with_them() -> None:
    found = steps(BuildConfig(scheme="w8a8", unquantized=("*.q.weight", "head*")))
    kept = [step.args["weight_NK"].value for step in found["linear"]]
    assert all(".q+k" in name or "head" in name for name in kept) and len(kept) == len(set(kept)) > 1
    with pytest.raises(CaptureError, match=r"scheme='w8a8': there is no linear to quantise .*unquantized=\('\*',\)"):
        steps(BuildConfig(scheme="w8a8", unquantized=("*",)))


def test_a_wrong_scheme_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"scheme must be .*w4a8_g32.*'w2'"):
        BuildConfig(scheme="w2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"unquantized=\('a',\) is for a scheme"):
        BuildConfig(unquantized=("a",))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32"])
def test_the_engine_keeps_what_its_recipes_say_of_the_models_own_weights(scheme: str, tmp_path) -> None:
    module = model()
    engine = build(module, output_dir=tmp_path / "engine", max_model_len=16, scheme=scheme)
    assert engine.manifest.scheme == scheme
    recipes, weights = read_recipes(engine.path), SafetensorsSource(engine.weights_path)
    merged = next(
        name for name, tree in recipes.items() if isinstance(tree, Concat) and name.endswith((".int8", ".int4"))
    )
    base = merged.rpartition(".")[0]
    parts = recipes[merged].parts
    assert len(parts) > 1 and all(isinstance(part, Quantized) for part in parts)
    plain = torch.cat([module.get_parameter(next(leaves(part)).name) for part in parts]).detach()
    found = dequantize_weight(weights.get(merged), weights.get(f"{base}.scales"))
    bound = 0.6 / 127 if scheme == "w8a8" else 1.6 / 8
    assert ((found - plain).abs() <= bound * plain.abs().max()).all() and not torch.equal(found, plain)


@pytest.mark.parametrize("node", [Scales, Quantized])
def test_the_recipe_nodes_are_read_as_they_were_written(node: type) -> None:
    tree = Concat((node(Checkpoint("a.weight", (8, 64)), G32), node(Checkpoint("b.weight"), G32)), 0)
    assert from_json(to_json(tree)) == tree
    assert describe(tree.parts[1]).endswith("(b.weight, int4_g32)")
