"""fuse_add_norm, fuse_linear_add, fuse_rope_kv: two or three calls become one, whoever else reads what is between."""

import pytest
import torch

from tritium import ops
from tritium.passes.fuse_add_norm import fuse_add_norm
from tritium.passes.fuse_linear_add import fuse_linear_add
from tritium.passes.fuse_rope_kv import fuse_rope_kv
from tritium.passes.insert_kv import insert_kv
from tritium.testing.graphs import calls, check_pass, graph_of

bf16 = torch.bfloat16
W, B = torch.randn(12), torch.randn(12)
WEIGHTS = ("w", "b", "w2")


def x(dtype=torch.float32):
    return torch.randn(8, 12).to(dtype)


def check(fn, *example, matches):
    return check_pass(fuse_add_norm, fn, example, matches=matches, weights=WEIGHTS)


SPELLED = {
    "rms_norm": lambda a, r, w: ops.rms_norm(a + r, w, 1e-5),
    "rms_norm of gemma": lambda a, r, w: ops.rms_norm(a + r, w, 1e-6, 1.0, False),
    "the summands swapped": lambda a, r, w: ops.rms_norm(torch.add(r, a), w, 1e-5),
    "layer_norm": lambda a, r, w, b: ops.layer_norm(a + r, w, b, 1e-5),
    "layer_norm without bias": lambda a, r, w: ops.layer_norm(a + r, w, None, 1e-5),
}


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("name", SPELLED)
def test_a_norm_of_a_sum_is_one_call_with_the_same_bits(name, dtype):
    fn = SPELLED[name]
    example = (x(dtype), x(dtype), W.to(dtype), B.to(dtype))[: 4 if name == "layer_norm" else 3]
    graph = check(fn, *example, matches=1)
    assert calls(graph) == ["add_layer_norm" if "layer" in name else "add_rms_norm", "getitem"]


def test_a_sum_that_the_next_residual_reads_is_the_second_result():
    def two_layers(a, r, w, w2):
        total = a + r
        after = total + ops.activation(ops.rms_norm(total, w, 1e-5), "silu")
        return after * ops.rms_norm(after, w2, 1e-5)

    graph = check(two_layers, x(), x(), W, B, matches=2)
    assert calls(graph).count("add_rms_norm") == 2 and "aten.add.Tensor" not in calls(graph)


def test_of_two_norms_of_one_sum_the_first_takes_the_addition():
    def parallel(a, r, w, w2, b):
        total = a + r
        return ops.layer_norm(total, w, b, 1e-5) * ops.layer_norm(total, w2, b, 1e-5) + total

    graph = check(parallel, x(), x(), W, W + 1, B, matches=1)
    assert calls(graph).count("layer_norm") == calls(graph).count("add_layer_norm") == 1


def test_a_sum_that_is_read_before_the_norm_is_still_computed_before():
    def early(a, r, w):
        total = a + r
        return total.tanh() + ops.rms_norm(total, w, 1e-5)

    check(early, x(), x(), W, matches=1)


NEAR_MISSES = {
    "a weighted sum": lambda a, r, w: ops.rms_norm(torch.add(a, r, alpha=2), w, 1e-5),
    "a number that is added": lambda a, r, w: ops.rms_norm(a + 1.0, w, 1e-5) * r,
    "a row that is broadcast": lambda a, r, w: ops.rms_norm(a + w, w, 1e-5) * r,
    "a difference": lambda a, r, w: ops.rms_norm(a - r, w, 1e-5),
    "a weight made in the graph": lambda a, r, w: ops.rms_norm(a + r, w * 2.0, 1e-5),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_sum_of_two_values_of_one_shape_stays(name):
    check(NEAR_MISSES[name], x(), x(), W, matches=0)


def rotated(q, k, v, positions, frequencies, *, turn=ops.rope):
    cos_sin = ops.rope_cos_sin(positions, frequencies)
    return ops.attention(turn(q, cos_sin), turn(k, cos_sin), v, 0.5)


HEADS = (torch.randn(8, 4, 6), torch.randn(8, 2, 6), torch.randn(8, 2, 6), torch.arange(8), torch.rand(3))


def fused(fn, *example):
    graph = graph_of(fn, example)
    insert_kv(graph)
    covered = {name for node in graph.nodes for name in node.meta["covers"]}
    matches = fuse_rope_kv(graph).num_matches
    assert fuse_rope_kv(graph).num_matches == 0
    graph.lint()
    assert {name for node in graph.nodes for name in node.meta["covers"]} == covered
    return matches, calls(graph)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_kv_store_of_a_layer_are_one_call(interleaved):
    def fn(q, k, v, positions, frequencies):
        return rotated(q, k, v, positions, frequencies, turn=lambda t, c: ops.rope(t, c, interleaved))

    assert fused(fn, *HEADS) == (1, ["rope_cos_sin", "rope_kv_store", "paged_attention"])


def test_each_layer_is_a_match_and_layers_without_rotation_keep_kv_store():
    def fn(q, k, v, positions, frequencies):
        first = rotated(q, k, v, positions, frequencies)
        second = ops.attention(first, k, v, 0.5)
        return rotated(second, v, k, positions, frequencies)

    matches, names = fused(fn, *HEADS)
    assert matches == 2 and names.count("kv_store") == 1 and "rope" not in names


NEAR_MISSES_OF_ROPE = {
    "keys that something else reads": lambda q, k, v, p, f: (
        rotated(q, k, v, p, f) + ops.rope(k, ops.rope_cos_sin(p, f)).repeat_interleave(2, 1)
    ),
    "queries that something else reads": lambda q, k, v, p, f: (
        rotated(q, k, v, p, f) + ops.rope(q, ops.rope_cos_sin(p, f))
    ),
    "keys turned by other angles": lambda q, k, v, p, f: ops.attention(
        ops.rope(q, ops.rope_cos_sin(p, f)), ops.rope(k, ops.rope_cos_sin(p, f, 2.0)), v, 0.5
    ),
    "keys turned in another way": lambda q, k, v, p, f: ops.attention(
        ops.rope(q, ops.rope_cos_sin(p, f)), ops.rope(k, ops.rope_cos_sin(p, f), True), v, 0.5
    ),
    "keys that are not turned": lambda q, k, v, p, f: ops.attention(ops.rope(q, ops.rope_cos_sin(p, f)), k, v, 0.5),
}


@pytest.mark.parametrize("name", NEAR_MISSES_OF_ROPE)
def test_what_only_looks_like_a_rotated_layer_stays(name):
    assert fused(NEAR_MISSES_OF_ROPE[name], *HEADS)[0] == 0


def test_a_residual_of_a_quantized_linear_is_part_of_it():
    qweight, scales = torch.randint(-127, 128, (12, 12), dtype=torch.int8), torch.rand(12, 1) / 100

    def fn(a, w, s):
        return a.tanh() + ops.quantized_linear(a, w, s, None, True)

    graph = check_pass(fuse_linear_add, fn, (x(), qweight, scales), matches=1, weights=("w", "s"))
    assert calls(graph) == ["aten.tanh", "quantized_linear_add"]


def test_a_linear_added_to_itself_keeps_its_sum():
    check_pass(fuse_linear_add, lambda a, w: (h := ops.linear(a, w, None)) + h, (x(), torch.eye(12)), matches=0)
