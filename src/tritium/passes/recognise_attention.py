"""Find attention in any layout of heads and tokens.

Matches: `aten.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal=True, scale=..., enable_gqa=...)` on [N, T, H]
    values, leading dimensions of size 1 allowed; k and v with each kv head repeated for its query heads
    (repeat_interleave, or expand and reshape).
Replaces with: `tritium.attention(q, k, v, scale)` on [T, N, H] values between permutations, which canonicalise cancels
    with the model's own; k and v before the repetition.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from tritium.graph.edit import arguments, insert, insert_inferred, replace
from tritium.graph.spec import NUM_TOKENS, args_of, spec_of, target_of
from tritium.graph.vocabulary import VIEWS
from tritium.passes.result import PassResult

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ATTENTION = torch.ops.tritium.attention.default
VIEW, PERMUTE = aten.view.default, aten.permute.default
TRIAL_TOKENS = 3


def recognise_attention(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target is SDPA and _is_causal(node):
            with graph.inserting_before(node):
                replace(node, _attention(node))
            count += 1
    return PassResult(count)


def read_shared_heads(graph: fx.Graph) -> PassResult:
    """The second match of the module's docstring: attention reads kv heads that stand for several query heads."""
    count = 0
    for node in graph.nodes:
        if node.target is ATTENTION:
            a = arguments(node)
            k, v = (_before_repetition(a[name], spec_of(a["q_TNH"]).shape[1]) for name in ("k_TKH", "v_TKH"))
            if k is not None and v is not None and k[1:] == v[1:]:
                with graph.inserting_before(node):
                    k_TKH, v_TKH = (_as_heads(node, *found) for found in (k, v))
                node.args = (a["q_TNH"], k_TKH, v_TKH, *args_of(node)[3:])
                count += 1
    return PassResult(count)


def _is_causal(node: fx.Node) -> bool:
    a = arguments(node)
    specs = [spec_of(a[name]) for name in ("query", "key", "value")]
    return (
        a["is_causal"]
        and a["attn_mask"] is None
        and a["dropout_p"] == 0.0
        and all(spec.rank >= 3 and spec.shape[-2] == NUM_TOKENS for spec in specs)
        and all(size == 1 for spec in specs for size in spec.shape[:-3])
        and (specs[0].shape[-3] == specs[1].shape[-3] or a["enable_gqa"])
    )


def _attention(node: fx.Node) -> fx.Node:
    a, graph = arguments(node), node.graph
    q, k, v = (_tokens_first(node, a[name]) for name in ("query", "key", "value"))
    scale = 1 / math.sqrt(spec_of(q).shape[2]) if a["scale"] is None else a["scale"]  # type: ignore[arg-type]
    out_TNH = insert(graph, ATTENTION, (q, k, v, scale), spec_of(q).with_shape(_result(q, v)), like=node, covers=[node])
    out = insert_inferred(graph, PERMUTE, (out_TNH, [1, 0, 2]), like=node)
    shape = [-1 if dim == NUM_TOKENS else dim for dim in spec_of(node).shape]
    return insert_inferred(graph, VIEW, (out, shape), like=node)


def _result(q: fx.Node, v: fx.Node) -> tuple[Any, ...]:
    return (*spec_of(q).shape[:2], spec_of(v).shape[2])


def _tokens_first(node: fx.Node, x: fx.Node) -> fx.Node:
    """[..., N, T, H] as [T, N, H]."""
    _, heads, _, size = (1, *spec_of(x).shape[-3:])
    x_NTH = insert_inferred(node.graph, VIEW, (x, [heads, -1, size]), like=node)
    return insert_inferred(node.graph, PERMUTE, (x_NTH, [1, 0, 2]), like=node)


class _Heads(NamedTuple):
    """A value [T, ...] that holds the heads [T, num_kv, head_size], in whatever shape."""

    value: fx.Node
    num_kv: int
    head_size: int


def _before_repetition(x: fx.Node, num_heads: Any) -> _Heads | None:
    """The kv heads of which `x` [T, N, H] holds each N / K times in a row, if views alone make it so.

    The views between are not compared with known ones but run, on numbers that name their place. A value of shape
    [T, K, H] is preferred; there is none where canonicalise has made one view of two.
    """
    chain: list[fx.Node] = []
    found = None
    node, head_size = x, _int(spec_of(x).shape[2])
    while node.target in VIEWS:
        chain.insert(0, node)
        node = args_of(node)[0]
        shape = spec_of(node).shape
        if shape[0] != NUM_TOKENS or any(not isinstance(size, int) for size in shape[1:]):
            continue
        num_kv, rest = divmod(math.prod(map(_int, shape[1:])), head_size)
        if rest or num_kv == num_heads or num_heads % num_kv:
            continue
        place = torch.arange(math.prod(_trial(shape))).view(_trial(shape))
        heads = place.view(-1, num_kv, head_size)
        is_repeated = _run(chain, place).equal(heads.repeat_interleave(num_heads // num_kv, dim=1))
        if is_repeated and (found is None or shape[1:] == (num_kv, head_size)):
            found = _Heads(node, num_kv, head_size)
    return found


def _as_heads(like: fx.Node, x: fx.Node, num_kv: int, head_size: int) -> fx.Node:
    """[T, K, H]."""
    if spec_of(x).shape[1:] == (num_kv, head_size):
        return x
    return insert_inferred(x.graph, VIEW, (x, [-1, num_kv, head_size]), like=like)


def _run(chain: list[fx.Node], value: torch.Tensor) -> torch.Tensor:
    for node in chain:
        args = args_of(node)[1:]
        is_view = node.target is VIEW
        value = value.reshape(_trial(spec_of(node).shape)) if is_view else target_of(node)(value, *args)
    return value


def _trial(shape: tuple[Any, ...]) -> list[int]:
    return [dim if isinstance(dim, int) else dim.tokens * TRIAL_TOKENS + dim.constant for dim in shape]


def _int(dim: Any) -> int:
    return dim if isinstance(dim, int) else 1 << 30
