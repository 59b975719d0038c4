"""Recipes: JSON and back, shapes foretold, wrong trees refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.errors import CheckpointError, EngineError
from tritium.weights.recipe_json import from_json, to_json
from tritium.weights.recipes import (
    Cast,
    Checkpoint,
    Concat,
    Constant,
    Reshape,
    Slice,
    Sum,
    Transpose,
    Zeros,
    describe,
    evaluate,
    infer,
    leaves,
    map_checkpoint,
)
from tritium.weights.source import DictSource, dtype_name

A, B = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(2, 4)
SOURCE = DictSource({"a": A, "b": B, "v": torch.arange(5.0), "i": torch.arange(3)})
CONSTANTS = {"k": torch.tensor([[1.0, 2.0]])}


@pytest.mark.parametrize(
    ("recipe", "expected", "text"),
    [
        (Checkpoint("a"), A, "a"),
        (Constant("k"), CONSTANTS["k"], "constant k"),
        (Cast(Checkpoint("a"), "bfloat16"), A.bfloat16(), "cast(a, bfloat16)"),
        (Transpose(Checkpoint("a")), A.T, "transpose(a)"),
        (Reshape(Checkpoint("a"), (2, 3, 2)), A.view(2, 3, 2), "reshape(a, [2, 3, 2])"),
        (Slice(Checkpoint("a"), 1, 1, 3), A[:, 1:3], "slice(a, dim=1, 1:3)"),
        (Concat((Checkpoint("a"), Checkpoint("b")), 0), torch.cat([A, B]), "concat(a, b, dim=0)"),
        (Sum((Checkpoint("a"), Checkpoint("a"))), A + A, "sum(a, a)"),
        (Zeros((2, 1), "bfloat16"), torch.zeros(2, 1, dtype=torch.bfloat16), "zeros([2, 1], bfloat16)"),
        (
            Transpose(Concat((Transpose(Checkpoint("b")), Transpose(Slice(Checkpoint("a"), 0, 2, 3))), 1)),
            torch.cat([B, A[2:]]),
            "transpose(concat(transpose(b), transpose(slice(a, dim=0, 2:3)), dim=1))",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_is_what_it_says(recipe, expected, text):
    assert torch.equal(evaluate(recipe, SOURCE, CONSTANTS), expected)
    assert describe(recipe) == text


def grow(inner):
    size = st.integers(0, 4)
    return (
        st.builds(Cast, inner, st.sampled_from(["float32", "bfloat16", "float16"]))
        | st.builds(Reshape, inner, st.lists(size, max_size=3).map(tuple))
        | st.builds(Transpose, inner)
        | st.builds(Slice, inner, st.integers(0, 2), size, size)
        | st.builds(Concat, st.lists(inner, min_size=1, max_size=3).map(tuple), st.integers(0, 2))
        | st.builds(Sum, st.lists(inner, min_size=1, max_size=3).map(tuple))
    )


leaf = (
    st.builds(Checkpoint, st.sampled_from(["a", "b", "v"]))
    | st.just(Constant("k"))
    | st.just(Checkpoint("a", (3, 4)))
    | st.just(Zeros((3, 4), "float32"))
)
trees = st.recursive(leaf, grow, max_leaves=6)


@given(trees)
def test_json_and_back_is_the_same_tree(recipe):
    assert from_json(to_json(recipe)) == recipe


@given(trees)
def test_shape_and_dtype_are_foretold_or_the_tree_is_refused(recipe):
    try:
        spec = infer(recipe, SOURCE, CONSTANTS)
    except CheckpointError:
        return
    tensor = evaluate(recipe, SOURCE, CONSTANTS)
    assert spec == (dtype_name(tensor.dtype), tuple(tensor.shape))


@given(trees)
def test_leaves_are_what_evaluation_reads(recipe):
    read = []

    class Watched(DictSource):
        def get(self, name):
            read.append(name)
            return super().get(name)

    try:
        evaluate(recipe, Watched({"a": A, "b": B, "v": torch.arange(5.0)}), CONSTANTS)
    except (RuntimeError, IndexError, CheckpointError):
        return
    assert read == [leaf.name for leaf in leaves(recipe) if isinstance(leaf, Checkpoint)]


@given(trees)
def test_leaves_can_be_replaced_and_nothing_else_is(recipe):
    renamed = map_checkpoint(recipe, lambda leaf: Checkpoint(f"model.{leaf.name}", leaf.shape))
    names = [leaf.name for leaf in leaves(recipe) if isinstance(leaf, Checkpoint)]
    assert [leaf.name for leaf in leaves(renamed) if isinstance(leaf, Checkpoint)] == [f"model.{n}" for n in names]
    assert map_checkpoint(renamed, lambda leaf: Checkpoint(leaf.name.removeprefix("model."), leaf.shape)) == recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Checkpoint("zz"), "the given state dict: tensor 'zz' is missing"),
        (Checkpoint("a", (4, 3)), r"tensor 'a' is \[3, 4\], expected \[4, 3\]"),
        (Checkpoint("i"), "tensor 'i' has dtype int64"),
        (Transpose(Checkpoint("v")), r"transpose\(v\): cannot transpose a tensor of shape \[5\]"),
        (Reshape(Checkpoint("v"), (2, 3)), r"reshape\(v, \[2, 3\]\): cannot reshape a tensor of shape \[5\]"),
        (Slice(Checkpoint("a"), 1, 2, 5), r"slice\(a, dim=1, 2:5\): out of range for a tensor of shape \[3, 4\]"),
        (Slice(Checkpoint("a"), 2, 0, 1), "out of range"),
        (Concat((Checkpoint("a"), Checkpoint("b")), 1), "parts do not fit together along dimension 1"),
        (Concat((Checkpoint("a"), Cast(Checkpoint("b"), "float16")), 0), "parts do not fit"),
        (Sum((Checkpoint("a"), Checkpoint("b"))), r"added must be alike: float32\[3, 4\], float32\[2, 4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tree_that_cannot_be_is_refused_with_its_text(recipe, message):
    with pytest.raises(CheckpointError, match=message):
        infer(recipe, SOURCE)


def test_a_sum_is_rounded_once():
    thirds = torch.tensor([1.0, 1 / 256, 1 / 256])  # in bf16, 1 + 1/256 is 1, but 1 + 1/256 + 1/256 is not
    parts = tuple(Cast(Slice(Checkpoint("t"), 0, i, i + 1), "bfloat16") for i in range(3))
    assert evaluate(Sum(parts), DictSource({"t": thirds})).item() == 1 + 1 / 128


def test_a_tree_over_a_models_tensors_becomes_one_over_the_checkpoints():
    known = {"q": Transpose(Checkpoint("a")), "k": Transpose(Checkpoint("b"))}
    merged = map_checkpoint(Concat((Checkpoint("q"), Checkpoint("k")), 1), lambda leaf: known[leaf.name])
    assert torch.equal(evaluate(merged, SOURCE), torch.cat([A.T, B.T], 1))


def test_an_unknown_constant_names_the_known_ones():
    with pytest.raises(EngineError, match="constant 'q' was not given; known: k"):
        evaluate(Constant("q"), SOURCE, CONSTANTS)


@pytest.mark.parametrize(
    "data",
    [None, 3, "a", [], {}, {"checkpoint": 3}, {"checkpoint": "a", "shape": [-1]}, {"checkpoint": "a", "more": 1},
     {"cast": {"checkpoint": "a"}, "dtype": "nn"}, {"cast": {"checkpoint": "a"}}, {"eval": "a"},
     {"slice": {"checkpoint": "a"}, "dim": 0, "start": True, "stop": 2}, {"concat": 3, "dim": 0},
     {"sum": []}, {"zeros": [2], "dtype": "int8"},
     {"transpose": {"transpose": None}}, {"reshape": {"checkpoint": "a"}, "shape": None},
     {"shape": [1], "checkpoint": "a"}],
    ids=str,
)  # fmt: skip
def test_json_that_is_no_recipe_is_refused(data):
    with pytest.raises(EngineError, match="not a weight recipe"):
        from_json(data)


def test_casting_rounds_to_nearest_even():
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # exactly between two bf16 numbers
    cast = evaluate(Cast(Checkpoint("h"), "bfloat16"), DictSource({"h": halves}))
    assert cast.tolist() == [1.0, 1 + 2**-6]
    assert math.isclose(cast[1].item(), 1.015625)
