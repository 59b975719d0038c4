"""Give every attention its paged KV cache.

Matches: `tritium.attention(q, k, v, scale, causal=True, window, softcap, alibi_slopes)`.
Replaces with: `tritium.kv_store(k, v, kv.i, slot_mapping.g)` and
    `tritium.paged_attention(q, kv.i, block_table.g, cu_seqlens_q, context_lens, batch_counts, scale, window, softcap,
    alibi_slopes)`,
    i the layer's number in graph order, g its KV group. Here one captured sequence becomes a packed batch.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import fx

from tritium.engine.plan import Extent, KVGroup
from tritium.errors import CaptureError
from tritium.graph.edit import arguments, insert, insert_input, replace
from tritium.graph.spec import NUM_TOKENS, Spec, dtype_name, spec_of
from tritium.passes.result import PassResult

NUM_SEQUENCES = Extent(sequences=1)
PLUS_ONE = Extent(sequences=1, constant=1)
ANY_SIZE = -1  # block table width: the runtime's choice


class _Kind(NamedTuple):
    """What layers of one KV group have in common."""

    window: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


def insert_kv(graph: fx.Graph) -> tuple[PassResult, tuple[KVGroup, ...]]:
    """See the module's docstring. Raises `CaptureError` for attention that is not causal."""
    layers = [node for node in graph.nodes if node.target is torch.ops.tritium.attention.default]
    kinds = [_kind(node) for node in layers]
    groups = _groups(kinds)
    if not layers:
        return PassResult(0), groups
    shared = {
        name: insert_input(graph, "input", name, spec)
        for name, spec in (
            ("cu_seqlens_q", Spec(torch.int32, (PLUS_ONE,))),
            ("context_lens", Spec(torch.int32, (NUM_SEQUENCES,))),
            ("batch_counts", Spec(torch.int32, (4,))),
        )
    }
    for g in range(len(groups)):
        shared[f"slot_mapping.{g}"] = insert_input(
            graph, "input", f"slot_mapping.{g}", Spec(torch.int64, (NUM_TOKENS,))
        )
        table = Spec(torch.int32, (NUM_SEQUENCES, ANY_SIZE))
        shared[f"block_table.{g}"] = insert_input(graph, "input", f"block_table.{g}", table)
    group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
    for layer, (node, kind) in enumerate(zip(layers, kinds, strict=True)):
        cache_spec = Spec(kind.dtype, (ANY_SIZE, 2, kind.num_kv_heads, ANY_SIZE, kind.head_size))
        cache = insert_input(graph, "kv", f"kv.{layer}", cache_spec)
        _rewrite(node, cache, shared, group_of[layer])
    return PassResult(len(layers)), groups


def _rewrite(node: fx.Node, cache: fx.Node, inputs: dict[str, fx.Node], group: int) -> None:
    a, ops = arguments(node), torch.ops.tritium
    with node.graph.inserting_before(node):
        store = (a["k_TKH"], a["v_TKH"], cache, inputs[f"slot_mapping.{group}"])
        insert(node.graph, ops.kv_store.default, store, None, like=node, covers=[node])
        names = (f"block_table.{group}", "cu_seqlens_q", "context_lens", "batch_counts")
        args = (a["q_TNH"], cache, *(inputs[name] for name in names))
        args += (a["scale"], a["window"], a["softcap"], a["alibi_slopes_N"])
        new = insert(node.graph, ops.paged_attention.default, args, spec_of(node), like=node, covers=[node])
    replace(node, new)


def _kind(node: fx.Node) -> _Kind:
    a = arguments(node)
    if not a["causal"]:
        raise CaptureError(
            f"{node.name} ({node.meta['source']}) is not causal: only causal attention can use a KV cache"
        )
    key, value, query = spec_of(a["k_TKH"]), spec_of(a["v_TKH"]), spec_of(a["q_TNH"])
    if key != value or query.shape[2] != key.shape[2] or _size(query, 1) % _size(key, 1):
        raise CaptureError(
            f"{node.name} ({node.meta['source']}): q {query}, k {key}, v {value}: the KV cache needs k and v of one "
            "shape, q's head size, and a number of q heads that is a multiple of the kv heads"
        )
    return _Kind(int(a["window"]), _size(key, 1), _size(key, 2), key.dtype)


def _size(spec: Spec, dim: int) -> int:
    size = spec.shape[dim]
    assert isinstance(size, int)  # heads and head size: rope and attention are refused with others
    return size


def _groups(kinds: list[_Kind]) -> tuple[KVGroup, ...]:
    """Layers of one kind, cut into groups of equally many layers, so that a block has the same size in every group."""
    sizes = {kind.num_kv_heads * kind.head_size * kind.dtype.itemsize for kind in kinds}
    if len(sizes) > 1:
        raise CaptureError(
            f"layers whose KV takes different numbers of bytes a token ({sorted(sizes)}) are not supported"
        )
    per_group = math.gcd(*Counter(kinds).values())
    groups = []
    for kind in dict.fromkeys(kinds):
        layers = [i for i, k in enumerate(kinds) if k == kind]
        for start in range(0, len(layers), per_group):
            groups.append(
                KVGroup(
                    layers=tuple(layers[start : start + per_group]),
                    window=kind.window,
                    num_kv_heads=kind.num_kv_heads,
                    head_size=kind.head_size,
                    dtype=dtype_name(kind.dtype),
                )
            )
    return tuple(groups)
