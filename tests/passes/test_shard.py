"""shard: the ranks' graphs together compute what one graph did; what does not divide is left to every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from tritium import ops
from tritium.graph.grammar import verify_captured
from tritium.mapping import Ranks
from tritium.passes.shard import shard
from tritium.testing.graphs import bound, calls, graph_of

HEADS, SIZE = 4, 6
WIDE = HEADS * SIZE
WEIGHTS = ("wq", "wk", "wv", "wo", "w1", "w2", "b1", "b2", "table", "experts", "downs")


def w(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * shape[-1] ** -0.5


def attention(x, wq, wk, wv, wo, kv=2, **more):
    heads = zip((wq, wk, wv), (HEADS, kv, kv), strict=True)
    q, k, v = (ops.linear(x, weight, None).view(-1, n, SIZE) for weight, n in heads)
    return ops.linear(ops.attention(q, k, v, 0.4, **more).reshape(-1, WIDE), wo, None)


def mlp(x, w1, b1, w2, b2):
    return ops.linear(ops.activation(ops.linear(x, w1, b1), "silu"), w2, b2)


def run_ranks(graphs: Sequence[fx.Graph], values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The graphs' results, each rank's, all run side by side; they must call the same in the same order."""
    bounds = [bound(graph, values) for graph in graphs]
    envs: list[dict[fx.Node, Any]] = [{} for _ in graphs]
    rows = [[n for n in graph.nodes if n.op == "call_function"] for graph in graphs]
    for env, known, graph in zip(envs, bounds, graphs, strict=True):
        env |= {n: known[n.meta["name"]] for n in graph.nodes if n.op == "placeholder" and n.users}
    for nodes in zip(*rows, strict=True):
        found = [fx.node.map_arg((n.args, dict(n.kwargs)), env.__getitem__) for n, env in zip(nodes, envs, strict=True)]
        assert len({n.target for n in nodes}) == 1
        if nodes[0].target is ops.all_reduce:
            results = [sum(args[0] for args, _ in found)] * len(nodes)
        elif nodes[0].target is ops.all_gather:
            results = [torch.cat([args[0] for args, _ in found], -1)] * len(nodes)
        else:
            reshape = nodes[0].target is torch.ops.aten.view.default
            results = [torch.reshape(*a) if reshape else nodes[0].target(*a, **k) for a, k in found]
        for node, env, result in zip(nodes, envs, results, strict=True):
            shape = [dim if isinstance(dim, int) else 8 for dim in node.meta["spec"].shape]
            assert list(result.shape) == shape, f"{node.name} is {list(result.shape)}, not {node.meta['spec']}"
            env[node] = result
    return [env[n.args[0][0]] for env, graph in zip(envs, graphs, strict=True) for n in graph.nodes if n.op == "output"]


def check(fn, *example, matches: int, num_ranks: int = 2) -> list[fx.Graph]:
    """Shard `fn` for every rank, run all, compare each rank's result with `fn`'s."""
    graphs = [graph_of(fn, example, weights=WEIGHTS) for _ in range(num_ranks)]
    names = [n.meta["name"] for n in graphs[0].nodes if n.op == "placeholder"]
    covered = {name for node in graphs[0].nodes for name in node.meta["covers"]}
    for rank, graph in enumerate(graphs):
        assert shard(graph, Ranks(tensor_parallel=num_ranks, rank=rank)).num_matches == matches
        verify_captured(graph)
        assert shard(graph, Ranks(tensor_parallel=num_ranks, rank=rank)).num_matches == 0
        assert {name for node in graph.nodes for name in node.meta["covers"]} == covered
    for result in run_ranks(graphs, dict(zip(names, example, strict=True))):
        torch.testing.assert_close(result, fn(*example), rtol=0, atol=1e-5)
    return graphs


def sizes(graph: fx.Graph, target: Any) -> list[tuple[Any, ...]]:
    return [tuple(n.meta["spec"].shape[1:]) for n in graph.nodes if n.target is target]


X = torch.randn(8, 20)
ATTENTION = (w(WIDE, 20), w(2 * SIZE, 20), w(2 * SIZE, 20), w(20, WIDE))
MLP = (w(14, 20), torch.randn(14), w(20, 14), torch.randn(20))


def test_attention_is_cut_by_heads_and_summed_once():
    def fn(x, wq, wk, wv, wo):
        return attention(x, wq, wk, wv, wo)

    for graph in check(fn, X, *ATTENTION, matches=1):
        assert sizes(graph, ops.attention) == [(2, SIZE)]
        assert calls(graph).count("all_reduce") == 1


def test_a_kv_head_is_repeated_for_the_ranks_that_read_it():
    def fn(x, wq, wk, wv, wo):
        return attention(x, wq, wk, wv, wo)

    for graph in check(fn, X, *ATTENTION, matches=1, num_ranks=4):
        (call,) = [n for n in graph.nodes if n.target is ops.attention]
        assert [n.meta["spec"].shape[1] for n in call.args[:3]] == [1, 1, 1]


def test_rotation_norms_of_heads_and_slopes_are_cut_with_them():
    def fn(x, wq, wk, wv, wo, positions, frequencies, slopes):
        cos_sin = ops.rope_cos_sin(positions, frequencies)
        q, k, v = (ops.linear(x, weight, None).view(-1, HEADS, SIZE) for weight in (wq, wk, wv))
        q, k = (ops.rope(ops.rms_norm(a, frequencies.repeat(2), 1e-5), cos_sin) for a in (q, k))
        return ops.linear(ops.attention(q, k, v, 0.4).reshape(-1, WIDE), wo, None) * slopes

    check(
        fn, X, *(w(WIDE, 20) for _ in range(3)), w(20, WIDE), torch.arange(8), torch.rand(3), torch.rand(20), matches=1
    )


def test_an_mlps_width_is_cut_and_its_last_bias_added_once():
    def fn(x, w1, b1, w2, b2):
        return mlp(x, w1, b1, w2, b2)

    for graph in check(fn, X, *MLP, matches=1):
        assert sizes(graph, ops.activation) == [(7,)]


def test_parallel_blocks_are_summed_before_one_reduction():
    def fn(x, wq, wk, wv, wo, w1, b1, w2, b2):
        return x + (attention(x, wq, wk, wv, wo) + mlp(x, w1, b1, w2, b2))

    for graph in check(fn, X, *ATTENTION, *MLP, matches=2):
        assert calls(graph).count("all_reduce") == 1


def test_layers_in_a_row_are_each_cut():
    def fn(x, wq, wk, wv, wo, w1, b1, w2, b2):
        x = x + attention(x, wq, wk, wv, wo)
        return x + mlp(x, w1, b1, w2, b2)

    for graph in check(fn, X, *ATTENTION, *MLP, matches=2):
        assert calls(graph).count("all_reduce") == 2


def test_every_experts_width_is_cut():
    def fn(x, router, experts, downs):
        return ops.moe(x, router, experts, downs, 2, True, "silu")

    check(fn, X, torch.randn(8, 3), w(3, 28, 20), w(3, 20, 14), matches=1)


def test_a_tied_table_is_cut_by_tokens_and_logits_are_gathered():
    def fn(input_ids, table):
        return ops.linear(ops.embedding(input_ids, table), table, None) * 2.0

    for graph in check(fn, torch.arange(8) * 2, torch.randn(18, 20), matches=2):
        assert sizes(graph, ops.linear) == [(9,)] and sizes(graph, ops.all_gather) == [(18,)]


def two(x, w1, w2):
    return ops.linear(ops.linear(x, w1, None), w2, None)


def read_inside(x, w1, w2):
    h = ops.activation(ops.linear(x, w1, None), "silu")
    return ops.linear(h, w2, None) + h.mean(-1, keepdim=True)


def weight_read_twice(x, w1, w2):
    return two(x, w1, w2) + ops.linear(x, w1, None).sum(-1, keepdim=True)


def normed(x, w1, w2, b1):
    return ops.activation(ops.linear(ops.rms_norm(ops.linear(x, w1, None), b1, 1e-5), w2, None), "silu")


def halved(x, w1, w2):
    return ops.activation(ops.linear(ops.linear(x, w1, None)[:, :7], w2, None), "silu")


NEAR_MISSES = {
    "a width that does not divide": (lambda x, w1, w2: ops.activation(two(x, w1, w2), "silu"), X, w(13, 20), w(20, 13)),
    "a value that others read": (read_inside, X, w(14, 20), w(20, 14)),
    "a weight that others read": (weight_read_twice, X, w(14, 20), w(20, 14)),
    "a norm of the whole width": (normed, X, w(14, 20), w(20, 14), torch.rand(14)),
    "a half of the width": (halved, X, w(14, 20), w(20, 7)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_cannot_be_computed_part_by_part_is_left_to_every_rank(name):
    fn, *example = NEAR_MISSES[name]
    check(fn, *example, matches=0)


def test_shares_are_equal_runs_in_the_order_of_the_ranks():
    assert [Ranks(tensor_parallel=4, rank=r).share(8, 4) for r in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [Ranks(tensor_parallel=4, rank=r).share(8, 2) for r in range(4)] == [(0, 4), (0, 4), (4, 8), (4, 8)]
    assert Ranks(tensor_parallel=2).share(7, 2) is None and Ranks(tensor_parallel=3).share(8, 2) is None
