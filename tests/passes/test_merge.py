"""Merging linears: one product for several of one input, slices in their places, the same numbers."""

import pytest
import torch

from tritium import ops
from tritium.graph.spec import spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.fold_weights import fold_weights
from tritium.passes.merge_gate_up import merge_gate_up
from tritium.passes.merge_parallel import merge_parallel
from tritium.passes.merge_qkv import merge_qkv
from tritium.passes.views import canonicalise_views
from tritium.testing.graphs import calls, check_pass, graph_of
from tritium.weights.recipes import Checkpoint, Concat, Slice, Transpose, Zeros

A, WQ, WK, WV = torch.randn(8, 12), torch.randn(12, 12), torch.randn(6, 12), torch.randn(6, 12)
WEIGHTS = ("q", "k", "v", "bq", "bk", "up", "down", "gate", "wide")
EXACT = 2e-5  # torch sums products of other sizes in another order; equal bits are tested with our kernels


def attend(q, k, v):
    heads = [t.view(-1, t.shape[-1] // 3, 3) for t in (q, k, v)]
    return ops.attention(*heads, 0.5).flatten(1)


def separate(x, q, k, v):
    return attend(ops.linear(x, q, None), ops.linear(x, k, None), ops.linear(x, v, None))


def check(run, fn, *example, matches, tolerance=EXACT):
    return check_pass(run, fn, example, matches=matches, tolerance=tolerance, weights=WEIGHTS)


def recipes(graph):
    return {n.meta["name"]: n.meta["recipe"] for n in graph.nodes if n.op == "placeholder" and "recipe" in n.meta}


def test_queries_keys_and_values_of_one_input_become_one_linear():
    graph = check(merge_qkv, separate, A, WQ, WK, WV, matches=1)
    assert calls(graph) == ["linear", "attention"]
    assert recipes(graph) == {"q+k+v": Concat((Checkpoint("q"), Checkpoint("k"), Checkpoint("v")), 0)}
    (linear,) = [n for n in graph.nodes if n.target is torch.ops.tritium.linear.default]
    assert spec_of(linear).shape[1] == 24 and len(linear.meta["covers"]) == 3


def test_rope_and_norms_between_linear_and_attention_do_not_hide_it():
    def rotated(x, q, k, v, norm, positions, frequencies):
        heads = [ops.linear(x, w, None).view(-1, w.shape[0] // 6, 6) for w in (q, k, v)]
        cos_sin = ops.rope_cos_sin(positions, frequencies)
        turned = [ops.rope(ops.rms_norm(t, norm, 1e-5), cos_sin) for t in heads[:2]]
        return ops.attention(*turned, heads[2], 0.5)

    example = (A, WQ, WK, WV, torch.randn(6), torch.arange(8), torch.rand(3))
    assert calls(check(merge_qkv, rotated, *example, matches=1)).count("linear") == 1


def test_a_bias_beside_a_linear_without_one_is_joined_with_zeros():
    def biased(x, q, k, v, bq, bk):
        return attend(ops.linear(x, q, bq), ops.linear(x, k, bk), ops.linear(x, v, None))

    graph = check(merge_qkv, biased, A, WQ, WK, WV, torch.randn(12), torch.randn(6), matches=1)
    assert recipes(graph)["q+k+v.bias"] == Concat((Checkpoint("bq"), Checkpoint("bk"), Zeros((6,), "float32")), 0)


def test_only_those_of_the_three_that_read_one_value_are_merged():
    def crossed(x, q, k, v):
        return attend(ops.linear(torch.tanh(x), q, None), ops.linear(x, k, None), ops.linear(x, v, None))

    assert calls(check(merge_qkv, crossed, A, WQ, WK, WV, matches=1)).count("linear") == 2


def test_two_layers_are_two_matches():
    def layers(x, q, k, v, up, gate, wide):
        x = separate(x, q, k, v)
        return attend(ops.linear(x, up, None), ops.linear(x, gate, None), ops.linear(x, wide, None))

    check(merge_qkv, layers, A, WQ, WK, WV, WQ, WK, WV, matches=2, tolerance=1e-4)


NEAR_MISSES = {
    "a weight that something else reads": lambda x, q, k, v: attend(
        *(ops.linear(x, w, None) for w in (q, k, k * 1.0))
    ).sum() + q.sum() + k.sum(),
    "weights that are inputs": lambda x, a, b, c: separate(x, a, b, c),
    "one linear that is cut in three": lambda x, wide: attend(*ops.linear(x, wide, None).split([12, 6, 6], -1)),
    "linears of three values": lambda x, q, k, v: attend(
        ops.linear(x, q, None), ops.linear(x.tanh(), k, None), ops.linear(x.sin(), v, None)
    ),
    "a sum between linear and attention": lambda x, q, k, v: attend(
        ops.linear(x, q, None) + 1.0, ops.linear(x, k, None) + 1.0, ops.linear(x, v, None) + 1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_queries_keys_and_values_stays(name):
    fn = NEAR_MISSES[name]
    example = (A, torch.randn(24, 12)) if "cut" in name else (A, WQ, WK, WV)
    check(merge_qkv, fn, *example, matches=0)


def test_a_value_that_something_else_reads_too_is_still_there_as_a_slice():
    def leaky(x, q, k, v):
        keys = ops.linear(x, k, None)
        return attend(ops.linear(x, q, None), keys, ops.linear(x, v, None)), keys.tanh()

    graph = graph_of(leaky, (A, WQ, WK, WV), weights=WEIGHTS)
    assert merge_qkv(graph).num_matches == 1
    assert sum(n.target is torch.ops.aten.slice.Tensor for n in graph.nodes) == 3


def test_gate_and_up_become_one_linear_and_the_activation_reads_its_halves():
    def mlp(x, gate, up, down):
        return ops.linear(ops.gated_activation(ops.linear(x, gate, None), ops.linear(x, up, None), "silu"), down, None)

    graph = check(merge_gate_up, mlp, A, WQ, torch.randn(12, 12), torch.randn(5, 12), matches=1)
    assert calls(graph) == ["linear", "gated_activation", "linear"]
    assert recipes(graph) == {"gate+up": Concat((Checkpoint("gate"), Checkpoint("up")), 0)}


@pytest.mark.parametrize("between", [torch.tanh, torch.neg])
def test_a_gate_that_is_changed_before_the_activation_stays(between):
    def mlp(x, gate, up):
        return ops.gated_activation(between(ops.linear(x, gate, None)), ops.linear(x, up, None), "silu")

    check(merge_gate_up, mlp, A, WQ, WQ + 1, matches=0)


def parallel(x, q, k, v, up, down):
    return separate(x, q, k, v) + ops.linear(ops.activation(ops.linear(x, up, None), "gelu"), down, None)


def test_a_parallel_block_has_one_linear_for_attention_and_mlp():
    def run(graph):
        merge_qkv(graph)
        result = merge_parallel(graph)
        canonicalise_views(graph)
        return result

    example = (A, WQ, WK, WV, torch.randn(20, 12), torch.randn(12, 20))
    graph = check(run, parallel, *example, matches=1)
    assert calls(graph) == ["linear", "attention", "activation", "linear", "aten.add.Tensor"]
    slices = [n.args[1:4] for n in graph.nodes if n.target is torch.ops.aten.slice.Tensor]
    assert sorted(slices) == [(1, 0, 12), (1, 12, 18), (1, 18, 24), (1, 24, 44)]


def test_a_slice_of_which_others_were_cut_goes_when_nothing_reads_it_any_more():
    graph = graph_of(parallel, (A, WQ, WK, WV, torch.randn(20, 12), torch.randn(12, 20)), weights=WEIGHTS)
    assert merge_qkv(graph).num_matches == merge_parallel(graph).num_matches == 1
    canonicalise_views(graph)
    assert not [node for node in graph.nodes if node.op == "call_function" and not node.users]


def test_an_mlp_that_reads_another_value_is_not_merged_with_attention():
    def serial(x, q, k, v, up, down):
        return separate(x, q, k, v) + ops.linear(ops.activation(ops.linear(x.tanh(), up, None), "gelu"), down, None)

    check(merge_parallel, serial, A, WQ, WK, WV, torch.randn(20, 12), torch.randn(12, 20), matches=0)


def test_a_transposed_weight_and_the_parts_of_one_matrix_are_folded_into_recipes():
    def conv1d(x, q, wide):
        k, v = wide.t()[:6], wide.t()[6:]
        return attend(ops.linear(x, q.t(), None), ops.linear(x, k, None), ops.linear(x, v, None))

    graph = check(fold_weights, conv1d, A, WQ, torch.randn(12, 12), matches=5)
    assert merge_qkv(graph).num_matches == 1
    remove_dead_code(graph)
    assert calls(graph) == ["linear", "attention"]
    (tree,) = (tree for name, tree in recipes(graph).items() if "+" in name)
    parts = [Transpose(Slice(Checkpoint("wide"), 1, *ends)) for ends in ((0, 6), (6, 12))]
    assert tree == Concat((Transpose(Checkpoint("q")), *parts), 0)


def test_a_weight_that_is_also_read_as_it_is_is_not_folded():
    check(fold_weights, lambda x, q: ops.linear(x, q, None) + ops.linear(x, q.t(), None), A, WQ, matches=0)


def test_a_cast_to_a_wider_type_is_not_folded_for_it_would_take_more_memory():
    def widened(x, q):
        return ops.linear(x, q.float(), None)

    check(fold_weights, widened, A, WQ.bfloat16(), matches=0)
    check(fold_weights, lambda x, q: ops.linear(x.bfloat16(), q.bfloat16(), None), A, WQ, matches=1)
