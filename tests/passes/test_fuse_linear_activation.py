"""fuse_linear_activation: an activation of a linear becomes part of it; a gated one, of the two halves of a linear."""

import pytest
import torch

from tritium import ops
from tritium.passes.fuse_linear_activation import fuse_linear_activation
from tritium.testing.graphs import calls, check_pass

X, W, B = torch.randn(8, 12), torch.randn(20, 12), torch.randn(20)


def check(fn, *example, matches):
    return check_pass(fuse_linear_activation, fn, example, matches=matches, tolerance=1e-6, weights=("w", "b", "w2"))


def gated(both, kind="silu", size=10):
    return ops.gated_activation(both[:, :size], both[:, size:], kind)


@pytest.mark.parametrize("kind", ["relu", "gelu_tanh"])
def test_an_activation_of_a_linear_is_one_call(kind):
    graph = check(lambda x, w, b: ops.activation(ops.linear(x, w, b), kind), X, W, B, matches=1)
    assert calls(graph) == ["linear_activation"]
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    assert len(node.meta["covers"]) == 2


def test_a_gate_and_what_it_gates_in_one_linear_are_one_call():
    graph = check(lambda x, w: gated(ops.linear(x, w, None)), X, W, matches=1)
    assert calls(graph) == ["linear_gated"]


def test_two_in_a_chain_are_two_matches():
    def mlp(x, w, w2):
        return ops.activation(ops.linear(gated(ops.linear(x, w, None)), w2, None), "relu")

    assert calls(check(mlp, X, W, torch.randn(5, 10), matches=2)) == ["linear_gated", "linear_activation"]


QWEIGHT, SCALES = torch.randint(-127, 128, (20, 12), dtype=torch.int8), torch.rand(20, 1) / 100


def check_quantized(fn, *, matches):
    example = (X, QWEIGHT, SCALES, B)
    return check_pass(fuse_linear_activation, fn, example, matches=matches, tolerance=1e-6, weights=("w", "s", "b"))


def test_an_activation_of_a_quantized_linear_is_one_call():
    def mlp(x, w, s, b):
        return ops.activation(ops.quantized_linear(x, w, s, b, True), "gelu")

    assert calls(check_quantized(mlp, matches=1)) == ["quantized_linear_activation"]


def test_the_halves_of_a_quantized_linear_are_one_call():
    graph = check_quantized(lambda x, w, s, b: gated(ops.quantized_linear(x, w, s, b, True)), matches=1)
    assert calls(graph) == ["quantized_linear_gated"]


def test_a_quantized_linear_that_something_else_reads_stays():
    def both(x, w, s, b):
        return ops.activation(h := ops.quantized_linear(x, w, s, b, False), "silu") + h

    check_quantized(both, matches=0)


NEAR_MISSES = {
    "a linear that something else reads": lambda x, w, b: ops.activation(h := ops.linear(x, w, b), "silu") + h,
    "halves the wrong way round": lambda x, w, b: ops.gated_activation(*ops.linear(x, w, b).chunk(2, -1)[::-1], "silu"),
    "parts of three": lambda x, w, b: ops.gated_activation(*ops.linear(x, w, b)[:, :18].chunk(2, -1), "silu"),
    "a half that something else reads": lambda x, w, b: gated(h := ops.linear(x, w, b)) + h[:, :10],
    "a sum between them": lambda x, w, b: ops.activation(ops.linear(x, w, b) + 1.0, "silu"),
    "halves of heads": lambda x, w, b: ops.gated_activation(*ops.linear(x, w, b).view(-1, 2, 10).chunk(2, -1), "silu"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_not_the_whole_of_a_linear_stays(name):
    check(NEAR_MISSES[name], X, W, B, matches=0)
