"""Let an attention and an MLP that read one normalised value share one linear.

Matches: linears that read one value, have weights that nothing else reads, and of which at least one leads to
    `tritium.attention` and at least one to an activation, through views, rope and norms alone.
Replaces with: one linear, of which each becomes a slice. Runs after merge_qkv and merge_gate_up, whose slices the new
    ones are cut from. Bits: each element is the sum over K that it was.
"""

import torch
from torch import fx

from tritium.passes.merging import by_input, is_mergeable, merge_linears, reaches
from tritium.passes.result import PassResult

_OURS = torch.ops.tritium
ATTENTION = frozenset({_OURS.attention.default})
ACTIVATIONS = frozenset({_OURS.activation.default, _OURS.gated_activation.default})


def merge_parallel(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for group in by_input(node for node in graph.nodes if is_mergeable(node)):
        to_attention = [node for node in group if reaches(node, ATTENTION)]
        to_activation = [node for node in group if node not in to_attention and reaches(node, ACTIVATIONS)]
        if to_attention and to_activation:
            merge_linears([*to_attention, *to_activation])
            count += 1
    return PassResult(count)
