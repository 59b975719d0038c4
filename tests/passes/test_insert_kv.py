"""insert_kv: attention gets its paged cache, layers fall into KV groups of one block size."""

import pytest
import torch

from tritium import ops
from tritium.errors import CaptureError
from tritium.graph.grammar import verify_captured
from tritium.passes.insert_kv import insert_kv
from tritium.testing.graphs import calls, graph_of


def layers(*windows: int, heads: int = 3):
    """A model of attention layers with these windows."""

    def fn(a):
        for window in windows:
            q, k = a.view(-1, 6, 2), a.view(-1, 6, 2)[:, :heads]
            a = a + ops.attention(q, k, k * 2.0, 0.5, window=window).flatten(1)
        return a

    return graph_of(fn, [torch.randn(8, 12)])


def groups(*windows: int) -> list[tuple[int, tuple[int, ...]]]:
    return [(group.window, group.layers) for group in insert_kv(layers(*windows))[1]]


def test_each_attention_becomes_a_store_and_a_paged_attention():
    graph = layers(0, 0)
    result, (group,) = insert_kv(graph)
    verify_captured(graph)
    assert result.num_matches == 2
    assert [c for c in calls(graph) if "aten" not in c] == ["kv_store", "paged_attention"] * 2
    assert (group.layers, group.num_kv_heads, group.head_size, group.dtype) == ((0, 1), 3, 2, "float32")
    stores = [n for n in graph.nodes if n.target is torch.ops.tritium.kv_store.default]
    assert [n.args[2].meta["name"] for n in stores] == ["kv.0", "kv.1"]
    attentions = [n for n in graph.nodes if n.target is torch.ops.tritium.paged_attention.default]
    assert [n.args[2].meta["name"] for n in attentions] == ["block_table.0"] * 2
    assert [n.meta["covers"] for n in attentions] == [("attention",), ("attention_1",)]


def test_a_second_run_matches_nothing():
    graph = layers(0)
    insert_kv(graph)
    assert insert_kv(graph)[0].num_matches == 0


def test_windows_and_scale_reach_the_kernel():
    graph = layers(7)
    insert_kv(graph)
    (attention,) = [n for n in graph.nodes if n.target is torch.ops.tritium.paged_attention.default]
    assert attention.args[-4:] == (0.5, 7, 0.0, None)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((0, 0, 0), [(0, (0, 1, 2))]),
        ((5, 0), [(5, (0,)), (0, (1,))]),
        ((5, 5, 0, 5, 5, 0), [(5, (0, 1)), (5, (3, 4)), (0, (2, 5))]),
        ((5, 0, 0, 0), [(5, (0,)), (0, (1,)), (0, (2,)), (0, (3,))]),
    ],
    ids=str,
)
def test_layers_are_grouped_by_window_into_groups_of_equal_size(windows, expected):
    assert groups(*windows) == expected


def test_attention_to_the_future_is_refused():
    graph = graph_of(lambda a: ops.attention(*[a.view(-1, 6, 2)] * 3, 0.5, causal=False), [torch.randn(8, 12)])
    with pytest.raises(CaptureError, match=r"attention .* is not causal"):
        insert_kv(graph)


def test_heads_that_cannot_share_a_cache_are_refused():
    with pytest.raises(CaptureError, match=r"a number of q heads that is a multiple of the kv heads"):
        insert_kv(layers(0, heads=4))


def test_layers_of_different_kv_sizes_are_refused():
    def fn(a):
        b = ops.attention(*[a.view(-1, 6, 2)] * 3, 0.5).flatten(1)
        return b + ops.attention(a.view(-1, 6, 2), *[a.view(-1, 6, 2)[:, :3]] * 2, 0.5).flatten(1)

    with pytest.raises(CaptureError, match=r"different numbers of bytes a token"):
        insert_kv(graph_of(fn, [torch.randn(8, 12)]))
