"""Move casts down past what only moves elements: no value changes, and code that casts early or late becomes one graph.

Matches: `aten.view` or `aten.slice` of a cast; `aten.cat` of casts from one dtype to one dtype.
Replaces with: the cast of the view, slice or concatenation. A cast never passes arithmetic: that would change results.
    Sizes of 1 in front stay behind, in a view after the cast, and a view that only puts them there stays as it is: they
    move down past casts themselves (leading_ones.py), and two rules that undo each other's work would never end.
"""

from typing import Any

import torch
from torch import fx

from tritium.graph.edit import insert_inferred
from tritium.graph.spec import args_of, spec_of, target_of
from tritium.passes.leading_ones import num_leading_ones
from tritium.passes.result import PassResult
from tritium.passes.sinking import rewrite_calls

aten = torch.ops.aten
CAST = aten.to.dtype


def sink_casts(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    return rewrite_calls(graph, _sunk)


def _sunk(node: fx.Node) -> fx.Node | None:
    """The cast of the same call without casts, if it has any."""
    args = args_of(node)
    if node.target is aten.cat.default:
        inputs = [args_of(t)[0] for t in args[0] if t.target is CAST]
        is_of_casts = len(inputs) == len(args[0]) and len({spec_of(x).dtype for x in inputs}) == 1
        return _cast(node, (inputs, *args[1:])) if is_of_casts else None
    if node.target not in (aten.view.default, aten.slice.Tensor) or args[0].target is not CAST:
        return None
    if len(node.all_input_nodes) > 1:
        return None  # a size that is no number
    x, shape, ones = args_of(args[0])[0], spec_of(node).shape, num_leading_ones(spec_of(node).shape)
    if node.target is aten.slice.Tensor:
        return _cast(node, (x, *args[1:]))
    before = spec_of(x).shape
    if shape[ones:] != before[num_leading_ones(before) :]:
        new = _cast(node, (x, args[1][ones:]))
        return insert_inferred(node.graph, aten.view.default, (new, args[1]), like=node) if ones else new
    return None


def _cast(node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
    """The node's call with other arguments, cast to its dtype."""
    inner = insert_inferred(node.graph, target_of(node), args, like=node)
    return insert_inferred(node.graph, CAST, (inner, spec_of(node).dtype), like=node)
