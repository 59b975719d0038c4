"""Dummy weights: deterministic, of realistic scale, never zero or denormal."""

import pytest
import torch

from tritium import models
from tritium.errors import CheckpointError
from tritium.ops.quantized import dequantize_weight
from tritium.weights.dummy import BLOCK_LEN, DummySource
from tritium.weights.recipes import Checkpoint, evaluate
from tritium.weights.source import TensorSpec

SPECS = {
    "big.weight": TensorSpec("bfloat16", (1500, 1024)),
    "small.weight": TensorSpec("float32", (64, 100)),
    "norm.weight": TensorSpec("bfloat16", (4096,)),
    "q.bias": TensorSpec("float16", (4096,)),
    "wide.weight": TensorSpec("float16", (16, 16384)),
}


def test_a_tensor_depends_on_seed_and_name_and_not_on_order():
    forward, backward = DummySource(SPECS, 3), DummySource(SPECS, 3)
    first = {name: forward.get(name) for name in SPECS}
    second = {name: backward.get(name) for name in reversed(SPECS)}
    assert all(torch.equal(first[name], second[name]) for name in SPECS)
    assert not torch.equal(first["big.weight"], DummySource(SPECS, 4).get("big.weight"))
    other = DummySource({"other.weight": SPECS["big.weight"]}, 3).get("other.weight")
    assert not torch.equal(first["big.weight"], other)


@pytest.mark.parametrize("name", SPECS)
def test_values_have_the_scale_of_trained_weights_and_no_zero_or_denormal(name):
    dtype, shape = SPECS[name]
    tensor = DummySource(SPECS).get(name)
    assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
    values = tensor.double()
    mean, std = {"norm.weight": (1, 0.1), "q.bias": (0, 0.02)}.get(name, (0, shape[-1] ** -0.5))
    assert abs(values.mean() - mean) < 0.1 * std
    assert 0.9 * std < values.std() < 1.1 * std
    assert values.abs().min() >= torch.finfo(tensor.dtype).tiny


def test_rows_of_a_big_matrix_differ():
    tensor = DummySource(SPECS).get("big.weight")
    assert tensor.numel() > BLOCK_LEN
    assert len({row.view(torch.int16).numpy().tobytes() for row in tensor}) == len(tensor)


def test_every_weight_of_a_model_can_be_made():
    module = models.create(models.preset("gpt2"))
    recipes, constants = models.weight_recipes(module), models.constants(module)
    source = DummySource.for_recipes(recipes.values(), "bfloat16")
    for name, parameter in module.named_parameters():
        assert evaluate(recipes[name], source, constants).shape == parameter.shape


def test_a_recipe_without_a_shape_cannot_be_made_up():
    with pytest.raises(CheckpointError, match="the recipe of 'x' does not say its shape"):
        DummySource.for_recipes([Checkpoint("x")], "float32")


@pytest.mark.parametrize(("kind", "packed"), [("int8", 1), ("int4", 2)])
def test_a_quantised_weight_that_is_generated_has_the_scale_of_a_plain_one(kind, packed):
    num_out, num_in, groups = 300, 1024, 8 if kind == "int4" else 1
    for ends in ((f".{kind}", ".scales"), (f".{kind}", f".{kind}_scales")):
        specs = {
            f"w{ends[0]}": TensorSpec("uint8" if kind == "int4" else "int8", (num_out, num_in // packed)),
            f"w{ends[1]}": TensorSpec("float32", (num_out, groups)),
        }
        numbers, scales = (DummySource(specs).get(name) for name in specs)
        weight = dequantize_weight(numbers, scales)
        assert weight.shape == (num_out, num_in) and abs(float(weight.mean())) < 0.05 * num_in**-0.5 * 2.5
        assert 0.9 < float(weight.std()) * num_in**0.5 < 1.1
