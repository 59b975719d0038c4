"""Give every attention of an encoder the borders of the packed sequences.

Matches: `tritium.attention(q, k, v, scale, causal=False, window=0, softcap)`.
Replaces with: `tritium.varlen_attention(q, k, v, cu_seqlens_q, batch_counts, scale, softcap)`. Here one captured
    sequence becomes a packed batch.
"""

import torch
from torch import fx

from tritium.errors import CaptureError
from tritium.graph.edit import arguments, insert, insert_input, replace
from tritium.graph.spec import Spec, spec_of
from tritium.passes.insert_kv import PLUS_ONE
from tritium.passes.result import PassResult


def insert_varlen(graph: fx.Graph) -> PassResult:
    """See the module's docstring. Raises `CaptureError` for attention that is causal or has a window."""
    layers = [node for node in graph.nodes if node.target is torch.ops.tritium.attention.default]
    if not layers:
        return PassResult(0)
    starts = insert_input(graph, "input", "cu_seqlens_q", Spec(torch.int32, (PLUS_ONE,)))
    counts = insert_input(graph, "input", "batch_counts", Spec(torch.int32, (4,)))
    for node in layers:
        a = arguments(node)
        if a["causal"] or a["window"]:
            raise CaptureError(
                f"{node.name} ({node.meta['source']}) has causal={a['causal']}, window={a['window']}: in an encoder "
                "each token sees the whole sequence"
            )
        with graph.inserting_before(node):
            args = (a["q_TNH"], a["k_TKH"], a["v_TKH"], starts, counts, a["scale"], a["softcap"])
            target = torch.ops.tritium.varlen_attention.default
            replace(node, insert(graph, target, args, spec_of(node), like=node, covers=[node]))
    return PassResult(len(layers))
