"""Compute the gate and the value it gates by one linear.

Matches: `tritium.gated_activation(gate, up, kind)` whose arguments come, through views alone, from two linears that
    read one value, have weights that nothing else reads, and are of one dtype.
Replaces with: one linear [T, 2F] with the weight `concat(gate, up)`; the activation reads both halves where they lie.
Bits: each element is the sum over K that it was.
"""

import torch
from torch import fx

from tritium.graph.edit import arguments
from tritium.passes.merging import by_input, linear_behind, merge_linears
from tritium.passes.result import PassResult

GATED = torch.ops.tritium.gated_activation.default


def merge_gate_up(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.target is GATED:
            a = arguments(node)
            for group in by_input(linear_behind(a[name]) for name in ("gate", "up")):
                merge_linears(group)
                count += 1
    return PassResult(count)
