"""Add a residual to a linear's sums before they reach memory.

Matches: `linear(x, w, b) + r`, the terms in any order and of one shape and type, where nothing else reads the linear;
    the same of a `tritium.quantized_linear`. Of two linears the later one takes the other as its residual.
Replaces with: `tritium.linear_add(x, w, b, r)`; `tritium.quantized_linear_add` with its arguments and r. Bits do not
    change: the linear's result is rounded before the sum.
"""

import torch
from torch import fx

from tritium.graph.edit import given, insert, replace
from tritium.graph.spec import args_of, spec_of, target_of
from tritium.passes.merge_outputs import is_sum
from tritium.passes.result import PassResult

_OURS = torch.ops.tritium
ADDED = {
    _OURS.linear.default: _OURS.linear_add.default,
    _OURS.quantized_linear.default: _OURS.quantized_linear_add.default,
}


def fuse_linear_add(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        terms = args_of(node)[:2] if is_sum(node) else ()
        linears = [term for term in terms if term.target in ADDED and len(term.users) == 1]
        if not linears or terms[0] is terms[1]:
            continue
        linear = max(linears, key=order.__getitem__)
        (residual,) = (term for term in terms if term is not linear)
        with graph.inserting_before(node):
            args = (*given(linear), residual)
            new = insert(graph, ADDED[target_of(linear)], args, spec_of(node), like=linear, covers=[linear, node])
        order[new] = order[node]
        replace(node, new)
        graph.erase_node(linear)
        count += 1
    return PassResult(count)
