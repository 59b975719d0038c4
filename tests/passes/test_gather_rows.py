"""gather_sampled_rows: what follows the last attention runs over the sampled rows."""

import pytest
import torch
import torch.nn.functional as F

from tritium import ops
from tritium.errors import CaptureError
from tritium.graph.spec import NUM_ROWS, NUM_TOKENS, spec_of
from tritium.passes.gather_rows import gather_sampled_rows
from tritium.testing.graphs import calls, evaluate, graph_of

ROWS = torch.tensor([1, 4, 5, 7, 0, 2, 3, 6])  # as many as the helper's R, in another order


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (8, 12))


def attend(a: torch.Tensor) -> torch.Tensor:
    heads = a.view(-1, 3, 4)
    return ops.attention(heads, heads * 0.5, heads + 1.0, 0.5).flatten(1)


def check(fn, *example: torch.Tensor, matches: int):
    """Gathering early gives what gathering the logits would give; returns the graph."""
    graph = graph_of(fn, example)
    names = [node.meta["name"] for node in graph.nodes if node.op == "placeholder"]
    assert gather_sampled_rows(graph).num_matches == matches
    (result,) = evaluate(graph, dict(zip(names, example, strict=True)) | {"sampled_rows": ROWS})
    torch.testing.assert_close(result, fn(*example)[ROWS], rtol=1e-5, atol=1e-5)
    assert gather_sampled_rows(graph).num_matches == 0
    return graph


def late(graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "call_function" and spec_of(node).shape[0] == NUM_ROWS]


def test_residual_and_attention_are_gathered_and_the_rest_runs_on_rows():
    def block(a, w):
        a = a + attend(a)
        return F.relu(ops.linear(a, w, None)) * 2.0

    graph = check(block, x(), x(5, 12), matches=2)
    assert late(graph) == ["gather_rows", "gather_rows_1", "add_1", "linear", "relu", "mul_1"]


def test_the_layers_before_the_last_attention_still_see_every_token():
    def two_blocks(a):
        a = a + attend(a)
        return a + attend(a.tanh())

    graph = check(two_blocks, x(), matches=2)
    tokens = [n for n in graph.nodes if n.op == "call_function" and spec_of(n).shape[0] == NUM_TOKENS]
    assert [n.target for n in tokens].count(torch.ops.tritium.attention.default) == 2
    assert torch.ops.aten.tanh.default in [n.target for n in tokens]


def test_a_value_read_on_both_sides_is_gathered_for_one_of_them():
    graph = check(lambda a: attend(a) * a, x(), matches=2)
    assert calls(graph).count("gather_rows") == 2


def test_views_are_taken_before_when_the_tokens_stay_in_front():
    graph = check(lambda a: attend(a) + 1.0, x(), matches=1)
    gather = next(n for n in graph.nodes if n.target is torch.ops.tritium.gather_rows.default)
    assert spec_of(gather.args[0]).rank == 2


def test_views_that_move_the_tokens_run_on_rows():
    check(lambda a: ops.attention(*[a.view(-1, 3, 4)] * 3, 0.5).transpose(0, 1).mean(0), x(), matches=1)


def test_weights_are_not_gathered():
    graph = check(lambda a, w: attend(a) * w + w.tanh(), x(), x(12), matches=1)
    assert "tanh" not in late(graph)


def test_a_value_without_the_tokens_in_front_is_refused_with_its_name():
    graph = graph_of(lambda a, b: b + ops.attention(*[a.view(-1, 3, 4)] * 3, 0.5).transpose(0, 1), [x(), x(3, 8, 4)])
    with pytest.raises(CaptureError, match=r"\(float32\[3, T, 4\]; .*must have the tokens as first dimension"):
        gather_sampled_rows(graph)
