"""Rotate queries and keys and store keys and values in one step.

Matches: `tritium.kv_store(rope(k, cos_sin), v, cache, slots)` and `tritium.paged_attention(rope(q, cos_sin), cache,
    ...)` of one layer, both rotated by the same angles in the same way, and read by nothing else.
Replaces with: `tritium.rope_kv_store(q, k, v, cos_sin, cache, slots, interleaved)`, whose result the attention reads.
    Bits do not change. Layers without rotation keep `kv_store`.
"""

import torch
from torch import fx

from tritium.graph.edit import arguments, insert, replace
from tritium.graph.spec import spec_of
from tritium.passes.result import PassResult

_OURS = torch.ops.tritium
ROPE, STORE, ATTENTION = _OURS.rope.default, _OURS.kv_store.default, _OURS.paged_attention.default


def fuse_rope_kv(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for store in list(graph.nodes):
        if store.target is not STORE:
            continue
        a = arguments(store)
        readers = [n for n in a["cache_layer"].users if n.target is ATTENTION]
        if len(readers) == 1 and _are_rotated_alike(arguments(readers[0])["q_TNH"], a["k_TKH"]):
            _rewrite(store, arguments(readers[0])["q_TNH"], a["k_TKH"])
            count += 1
    return PassResult(count)


def _are_rotated_alike(q: fx.Node, k: fx.Node) -> bool:
    if not (q.target is ROPE and k.target is ROPE and len(q.users) == 1 and len(k.users) == 1):
        return False
    return [arguments(q)[name] for name in ("cos_sin", "interleaved")] == [
        arguments(k)[name] for name in ("cos_sin", "interleaved")
    ]


def _rewrite(store: fx.Node, q: fx.Node, k: fx.Node) -> None:
    """`q` and `k`: the two calls of rope."""
    graph, a, r = store.graph, arguments(store), arguments(k)
    tensors = (arguments(q)["x_TNH"], r["x_TNH"], a["v_TKH"], r["cos_sin"], a["cache_layer"], a["slot_mapping_T"])
    with graph.inserting_before(store):  # behind the rotated queries too: insert_kv puts both before the attention
        args = (*tensors, r["interleaved"])
        new = insert(graph, _OURS.rope_kv_store.default, args, spec_of(q), like=store, covers=[q, k, store])
    replace(q, new)
    graph.erase_node(store)
    graph.erase_node(k)
