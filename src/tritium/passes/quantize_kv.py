"""Keep keys and values in int8, with a scale for each token and head.

Matches: every layer's KV cache, after `insert_kv`.
Replaces with: the same cache in int8, whose rows are the head and the bytes of its scale (ops/attention.py `kv_store`).
    The ops that write and read it stay as they are. Bits change.
"""

from collections.abc import Sequence

import msgspec
import torch
from torch import fx

from tritium.engine.plan import KVGroup
from tritium.graph.spec import Spec, spec_of
from tritium.ops.quantized import SCALE_BYTES
from tritium.passes.result import PassResult


def quantize_kv(graph: fx.Graph, groups: Sequence[KVGroup]) -> tuple[PassResult, tuple[KVGroup, ...]]:
    """See the module's docstring. Returns the groups in int8; a cache that is in int8 already is left alone."""
    count = 0
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "kv" and spec_of(node).dtype != torch.int8:
            *sizes, head_size = spec_of(node).shape
            node.meta["spec"] = Spec(torch.int8, (*sizes, int(head_size) + SCALE_BYTES))  # type: ignore[arg-type]
            count += 1
    return PassResult(count), tuple(map(_in_int8, groups))


def _in_int8(group: KVGroup) -> KVGroup:
    if group.dtype == "int8":
        return group
    return msgspec.structs.replace(group, dtype="int8", head_size=group.head_size + SCALE_BYTES)
