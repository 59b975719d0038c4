"""fold_constants: what depends on no input is computed once."""

import pytest
import torch
from torch import nn

from tritium import ops
from tritium.graph.capture import capture
from tritium.passes.canonicalise import canonicalise
from tritium.passes.fold_constants import constants_of, fold_constants
from tritium.testing.graphs import calls, check_pass


class Frequencies(nn.Module):
    """Rotary frequencies, made in forward() out of nothing or out of a buffer with real numbers."""

    def __init__(self, *, has_buffer: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 12, device="meta")
        self.scale = nn.Parameter(torch.ones(12, device="meta"))
        self.register_buffer("exponents", torch.arange(0, 12, 2) / 12 if has_buffer else None)

    def forward(self, input_ids, positions):
        exponents = torch.arange(0, 12, 2, device=positions.device) / 12 if self.exponents is None else self.exponents
        cos_sin = ops.rope_cos_sin(positions, 1.0 / 10000.0**exponents)
        return self.embed(input_ids) * cos_sin * (self.scale + 1.0)


@pytest.mark.parametrize("has_buffer", [False, True])
def test_frequencies_become_one_constant_and_parameters_stay(has_buffer):
    graph = capture(Frequencies(has_buffer=has_buffer)).graph
    canonicalise(graph)
    folded = fold_constants(graph).num_matches
    assert folded >= 2 and fold_constants(graph).num_matches == 0
    assert "aten.pow.Scalar" not in calls(graph) and calls(graph).count("aten.add.Tensor") == 1
    (value,) = constants_of(graph).values()
    assert torch.equal(value, 1.0 / 10000.0 ** (torch.arange(0, 12, 2) / 12))
    (constant,) = [n for n in graph.nodes if n.op == "placeholder" and n.users and "value" in n.meta]
    assert constant.meta["recipe"].name == constant.meta["name"] in constants_of(graph)


def test_chained_calls_are_each_a_match_and_keep_their_value():
    def fn(a):
        return a + torch.arange(3.0, device=a.device).exp().neg()

    graph = check_pass(fold_constants, fn, [torch.randn(8, 3)], matches=3, tolerance=1e-6)
    assert calls(graph) == ["aten.add.Tensor"]


def test_random_numbers_and_values_of_the_inputs_are_not_constants():
    check_pass(fold_constants, lambda a: a.exp() + 1.0, [torch.randn(8, 3)], matches=0)

    def noisy(a):
        return a + torch.rand(3, device=a.device)

    check_pass(fold_constants, noisy, [torch.randn(8, 3)], matches=0, tolerance=None)


def test_a_constant_read_twice_is_folded_once():
    def fn(a):
        c = torch.full((3,), 2.0, device=a.device)
        return a * c + a.exp() / c

    check_pass(fold_constants, fn, [torch.randn(8, 3)], matches=1)
