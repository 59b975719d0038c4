"""Compute queries, keys and values by one linear.

Matches: `tritium.attention(q, k, v, ...)` of which two or three arguments come, through views, rope and norms alone,
    from linears that read one value, have weights that nothing else reads, and are of one dtype.
Replaces with: one linear, of which each becomes a slice. Its weight is the recipe `concat(q, k, v)`.
Bits: each element is the sum over K that it was.
"""

import torch
from torch import fx

from tritium.graph.edit import arguments
from tritium.passes.merging import THROUGH, by_input, linear_behind, merge_linears
from tritium.passes.result import PassResult

ATTENTION = torch.ops.tritium.attention.default


def merge_qkv(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target is ATTENTION:
            a = arguments(node)
            for group in by_input(linear_behind(a[name], THROUGH) for name in ("q_TNH", "k_TKH", "v_TKH")):
                merge_linears(group)
                count += 1
    return PassResult(count)
