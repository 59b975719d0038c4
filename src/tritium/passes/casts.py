"""Move casts down past what only moves elements: no value changes, and code that casts early or late becomes one graph.

Matches: `aten.view` or `aten.slice` of a cast; `aten.cat` of casts from one dtype to one dtype.
Replaces with: the cast of the view, slice or concatenation. A cast never passes arithmetic: that would change results.
    Nor a view that only puts sizes of 1 in front: those move down past casts (leading_ones.py).
"""

from typing import Any

import torch
from torch import fx

from tritium.graph.edit import insert_inferred
from tritium.graph.spec import args_of, spec_of
from tritium.passes.result import PassResult
from tritium.passes.sinking import rewrite_calls

aten = torch.ops.aten
CAST = aten.to.dtype


def sink_casts(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    return rewrite_calls(graph, _sunk)


def _sunk(node: fx.Node) -> fx.Node | None:
    moved = _moved(node)
    if moved is None:
        return None
    inner = insert_inferred(node.graph, node.target, moved, like=node)
    return insert_inferred(node.graph, CAST, (inner, spec_of(node).dtype), like=node)


def _moved(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of the same call without the casts."""
    args = args_of(node)
    moves = (
        node.target in (aten.view.default, aten.slice.Tensor) and len(node.all_input_nodes) == 1
    )  # sizes are numbers
    if moves and args[0].target is CAST and not _adds_leading_ones(node):
        return (args_of(args[0])[0], *args[1:])
    if node.target is aten.cat.default and all(t.target is CAST for t in args[0]):
        inputs = [args_of(t)[0] for t in args[0]]
        if len({spec_of(x).dtype for x in inputs}) == 1:
            return (inputs, *args[1:])
    return None


def _adds_leading_ones(node: fx.Node) -> bool:
    shape, before = spec_of(node).shape, spec_of(args_of(node)[0]).shape
    added = len(shape) - len(before)
    return node.target is aten.view.default and added > 0 and shape == (1,) * added + before
