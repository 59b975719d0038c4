"""canonicalise and its rules: one form for what means the same."""

import pytest
import torch
import torch.nn.functional as F

from tritium.graph.vocabulary import VIEWS
from tritium.passes.canonicalise import canonicalise
from tritium.passes.casts import sink_casts
from tritium.passes.dead_code import remove_dead_code, remove_duplicates
from tritium.passes.permutes import sink_permutes
from tritium.passes.views import canonicalise_views
from tritium.testing.graphs import calls, check_pass, evaluate, graph_of

bf16 = torch.bfloat16


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (8, 6), dtype=dtype)


def form(fn, *example: torch.Tensor) -> list[tuple[str, str]]:
    """The canonical graph as op and arguments, with values numbered in order."""
    graph = graph_of(fn, example)
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return [(str(n.target), str(torch.fx.node.map_arg(list(n.args), lambda a: number[a]))) for n in graph.nodes
            if n.op == "call_function"]  # fmt: skip


SAME = {
    "identities": (
        lambda a: F.dropout(a.clone().detach().contiguous(), 0.5, training=False) + 1.0,
        lambda a: a + 1.0,
    ),
    "casts": (lambda a: a.to(bf16).tanh(), lambda a: a.bfloat16().tanh(), lambda a: a.type(bf16).tanh()),
    "casts to the same type": (lambda a: a.float().tanh(), lambda a: a.to(torch.float32).tanh(), lambda a: a.tanh()),
    "keywords": (
        lambda a: torch.mean(a, dim=-1, keepdim=True).tanh(),
        lambda a: a.mean(1, True).tanh(),
        lambda a: a.mean((-1,), keepdim=True).tanh(),
    ),
    "reshapes": (
        lambda a: a.view(-1, 2, 3),
        lambda a: a.reshape(a.shape[0], 2, 3),
        lambda a: a.unflatten(-1, (2, 3)),
        lambda a: a.view(-1, 3, 2).view(a.shape[0], 2, 3),
    ),
    "merges": (lambda a: a.unflatten(1, (2, 3)).flatten(1).tanh(), lambda a: a.tanh()),
    "new dimensions": (lambda a: a[:, None], lambda a: a.unsqueeze(1), lambda a: a.view(-1, 1, 6)),
    "dropped dimensions": (lambda a: a[:, None].squeeze(1) + 1.0, lambda a: a[:, None][:, 0] + 1.0, lambda a: a + 1.0),
    "transpositions": (
        lambda a: a.view(-1, 2, 3).transpose(0, 1),
        lambda a: a.view(-1, 2, 3).permute(1, 0, 2),
        lambda a: a.view(-1, 2, 3).movedim(0, 1),
        lambda a: a.view(-1, 2, 3).swapaxes(-3, -2),
    ),
    "there and back": (lambda a: a.view(-1, 2, 3).transpose(0, 1).transpose(0, 1).flatten(1) + 1.0, lambda a: a + 1.0),
    "cuts": (
        lambda a: torch.cat((a[:, 3:], a[:, :3]), 1),
        lambda a: torch.cat((a.chunk(2, -1)[1], a.chunk(2, -1)[0]), -1),
        lambda a: torch.cat((a.split(3, 1)[1], a.split([3, 3], 1)[0]), -1),
        lambda a: torch.cat((a.narrow(1, 3, 3), a.narrow(-1, 0, 3)), 1),
        lambda a: torch.cat((a[..., -3:], a[..., :-3]), 1),
    ),
    "a cut of a cut": (lambda a: a[:, 1:][:, 1:3] * 2.0, lambda a: a[:, 2:4] * 2.0),
    "pieces": (lambda a: a.view(-1, 2, 3).unbind(1)[1] * 2.0, lambda a: a.view(-1, 2, 3)[:, 1] * 2.0),
    "outer products": (
        lambda a: torch.outer(a[:, 0], a.new_ones(4)),
        lambda a: a[:, 0][:, None] * a.new_ones(4)[None],
        lambda a: a[:, :1] @ a.new_ones(4)[None],
        lambda a: torch.matmul(other=a[:, 0][None, None], input=a.new_ones(4)[None, :, None])[0].T,
    ),
    "repetitions": (
        lambda a: a.view(-1, 2, 3).repeat_interleave(5, 1),
        lambda a: a.view(-1, 2, 1, 3).expand(-1, 2, 5, 3).reshape(a.shape[0], -1, 3),
    ),
    "late and early casts": (
        lambda a: torch.cat((a.to(bf16)[:, 3:], a.to(bf16)[:, :3]), 1),
        lambda a: torch.cat((a[:, 3:], a[:, :3]), 1).to(bf16),
        lambda a: torch.cat((a[:, 3:].to(bf16), a[:, :3].to(bf16)), 1),
    ),
    "heads first and tokens first": (
        lambda a: F.gelu(a.view(-1, 2, 3).transpose(0, 1), approximate="tanh"),
        lambda a: F.gelu(a.view(-1, 2, 3), approximate="tanh").transpose(0, 1),
    ),
    "in place": (lambda a: (a * 2.0).add_(1.0).mul_(a), lambda a: (a * 2.0 + 1.0) * a),
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_thing_have_one_form(name):
    first, *others = SAME[name]
    example = x()
    expected = form(first, example)
    for other in others:
        assert form(other, example) == expected
        torch.testing.assert_close(evaluate(graph_of(other, (example,)), {"a": example})[0], first(example))


DIFFERENT = {
    "another dimension": (lambda a: a.mean(-1, keepdim=True), lambda a: a.mean(0, keepdim=True)),
    "training": (lambda a: F.dropout(a, 0.5, training=True) + 1.0, lambda a: a + 1.0),
    "another order of elements": (lambda a: a.view(-1, 2, 3).transpose(1, 2).flatten(1), lambda a: a * 1.0),
    "a cast before arithmetic": (lambda a: (a.to(bf16) * 2.0).float(), lambda a: (a * 2.0).to(bf16).float()),
    "tiles and repetitions": (
        lambda a: a.view(-1, 2, 3).repeat(1, 2, 1),
        lambda a: a.view(-1, 2, 3).repeat_interleave(2, 1),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_means_something_else_keeps_another_form(name):
    first, second = DIFFERENT[name]
    assert form(first, x()) != form(second, x())


def test_canonicalise_obeys_the_rules_of_a_pass():
    def fn(a: torch.Tensor) -> torch.Tensor:
        heads = F.dropout(a, 0.1, training=False).unflatten(-1, (2, 3)).transpose(0, 1)
        return (heads.float() * 2.0).transpose(0, 1).reshape(-1, 6).contiguous()

    graph = check_pass(canonicalise, fn, [x(8, 6, dtype=bf16)], matches=10, is_canonical=False)
    assert calls(graph) == ["aten.to.dtype", "aten.mul.Tensor"]


def test_views_obey_the_rules_of_a_pass():
    check_pass(canonicalise_views, lambda a: a.unflatten(-1, (2, 3)).chunk(3, -1)[1].tanh(), [x()], matches=4,
               is_canonical=False)  # fmt: skip


def test_permutations_sink_below_broadcasting_arithmetic():
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        heads = a.view(-1, 2, 3).permute(1, 0, 2)
        return heads * b + heads

    graph = check_pass(sink_permutes, fn, [x(), x(8, 3)], matches=0)
    last = [node for node in graph.nodes if node.op == "call_function"][-1]
    assert last.target is torch.ops.aten.permute.default


def test_permutations_of_values_that_differ_in_layout_stay():
    """Moving them would only put a new one in front of the other value, for ever."""
    check_pass(sink_permutes, lambda a, b: a.view(-1, 2, 3).permute(1, 0, 2) + b, [x(), x(2, 8, 3)], matches=0)


def test_casts_do_not_sink_below_arithmetic():
    check_pass(sink_casts, lambda a: (a.to(bf16) * 3.0)[:, 1:], [x()], matches=0)


def test_casts_of_two_types_are_not_joined():
    check_pass(sink_casts, lambda a, b: torch.cat((a.float(), b.float()), 1), [x(dtype=bf16), x(dtype=torch.float16)],
               matches=0)  # fmt: skip


def test_dead_code_goes_and_duplicates_are_one():
    def fn(a: torch.Tensor) -> torch.Tensor:
        a.tanh()
        return a.sigmoid() + a.sigmoid() * (a * 1.0) + a * 1.0

    graph = graph_of(fn, [x()], is_canonical=False)
    assert remove_dead_code(graph).num_matches == 1
    assert remove_dead_code(graph).num_matches == 0
    graph = check_pass(remove_duplicates, lambda a: a.sigmoid() + a.sigmoid().exp() * a.sigmoid(), [x()], matches=0)
    assert calls(graph).count("aten.sigmoid") == 1


def test_numbers_of_different_types_are_not_duplicates():
    graph = graph_of(lambda a: (a + 1) + (a + 1.0) + (a + True), [x()])
    assert calls(graph).count("aten.add.Tensor") == 5


def test_only_canonical_views_are_left_of_a_models_views():
    def fn(a: torch.Tensor) -> torch.Tensor:
        heads = a.view(a.shape[0], 2, 3).transpose(0, 1)[None]
        return heads.expand(1, 2, -1, 3).squeeze(0).transpose(0, 1).reshape(a.shape[0], 6)

    graph = graph_of(fn, [x()])
    assert [node.target for node in graph.nodes if node.op == "call_function" and node.target not in VIEWS] == []
