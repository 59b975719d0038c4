"""Erase a batch axis of one sequence: leading sizes of 1 move down and out.

Matches: an element-wise op, slice, concatenation, permutation, linear, lookup, norm, mean or softmax whose result
    has sizes of 1 in front that it leaves alone.
Replaces with: the same call without them, then `aten.view`. What broadcasts over nothing is no longer written out:
    `x[:, None] * y[None, :]` becomes `x[:, None] * y`.
"""

from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.edit import insert_inferred
from tritium.graph.spec import Dim, args_of, has_spec, spec_of, target_of
from tritium.graph.vocabulary import ALONG_LAST, POINTWISE
from tritium.passes.result import PassResult
from tritium.passes.sinking import rewrite_calls

aten = torch.ops.aten
VIEW, PERMUTE, SLICE = aten.view.default, aten.permute.default, aten.slice.Tensor
ALONG_LAST_DIM = {aten.mean.dim, aten.softmax.int}  # taken when they work along -1 and keep the rank


def sink_leading_ones(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    return rewrite_calls(graph, _sunk)


def _sunk(node: fx.Node) -> fx.Node | None:
    return None if _is_irregular(node) else _without_ones(node) or _narrower(node)


def num_leading_ones(shape: tuple[Dim, ...]) -> int:
    """How many sizes of 1 stand in front of another one; of nothing but sizes of 1, none does."""
    return next((i for i, dim in enumerate(shape) if dim != 1), 0)


def _is_irregular(node: fx.Node) -> bool:
    """True where two sizes depend on the batch: views of such values cannot be written with one -1."""
    return any(has_spec(n) and len(spec_of(n).batch_dims) > 1 for n in (node, *node.all_input_nodes))


def _without_ones(node: fx.Node) -> fx.Node | None:
    """The call on values without `ones` leading dimensions, seen with them again."""
    shape, args = spec_of(node).shape, args_of(node)
    ones = min(num_leading_ones(shape), _untouched(node))
    if ones <= 0:
        return None
    rank = len(shape) - ones
    if node.target in POINTWISE:
        args = tuple(_cut(node, a, rank) if has_spec(a) else a for a in args)
    elif node.target is aten.cat.default:
        args = ([_cut(node, a, rank) for a in args[0]], *args[1:])
    elif node.target is aten.embedding.default:
        args = (args[0], _cut(node, args[1], spec_of(args[1]).rank - ones), *args[2:])
    elif node.target is aten.index.Tensor:
        args = (args[0], [_cut(node, args[1][0], spec_of(args[1][0]).rank - ones)])
    elif node.target is SLICE:
        args = (_cut(node, args[0], rank), args[1] - ones, *args[2:])
    elif node.target is PERMUTE:
        args = (_cut(node, args[0], rank), [d - ones for d in args[1][ones:]])
    else:
        args = (_cut(node, args[0], rank), *args[1:])
    inner = insert_inferred(node.graph, node.target, args, like=node, kwargs=node.kwargs)
    return insert_inferred(node.graph, VIEW, (inner, _sizes(shape)), like=node)


def _untouched(node: fx.Node) -> int:
    """How many leading dimensions the op treats alike."""
    rank, args = spec_of(node).rank, args_of(node)
    if node.target in POINTWISE:
        return rank - 1
    if node.target is SLICE:
        return args[1]
    if node.target is aten.cat.default:
        return args[1] % rank
    if node.target is PERMUTE:
        return next((i for i, d in enumerate(args[1]) if i != d), 0)
    if node.target is aten.linear.default:
        return rank - 1
    if node.target is aten.embedding.default:
        return rank - 2
    if node.target is aten.index.Tensor and len(args[1]) == 1:
        return spec_of(args[1][0]).rank - 1
    if node.target in ALONG_LAST:
        return rank - len(args[1])
    if node.target in ALONG_LAST_DIM and args[1] in (-1, [-1]) and spec_of(args[0]).rank == rank:
        return rank - 1
    return 0


def _narrower(node: fx.Node) -> fx.Node | None:
    """An element-wise op that reads `view(x, [1, ..., *x.shape])` where broadcasting does the same for x."""
    if node.target not in POINTWISE:
        return None
    args, rank = list(args_of(node)), spec_of(node).rank
    for index, arg in enumerate(args):
        others = [a for i, a in enumerate(args) if i != index and has_spec(a)]
        if not has_spec(arg) or not any(spec_of(a).rank == rank for a in others):
            continue
        shape = spec_of(arg).shape
        ones = num_leading_ones(shape)
        if arg.target is VIEW and ones > 0:
            args[index] = _cut(node, arg, len(shape) - ones)
            return insert_inferred(node.graph, target_of(node), tuple(args), like=node, kwargs=node.kwargs)
    return None


def _cut(node: fx.Node, x: fx.Node, rank: int) -> fx.Node:
    """`x` without what it has in front of its last `rank` dimensions."""
    spec = spec_of(x)
    if spec.rank <= rank:
        return x
    return insert_inferred(node.graph, VIEW, (x, _sizes(spec.shape[spec.rank - rank :])), like=node)


def _sizes(shape: tuple[Any, ...]) -> list[int]:
    return [-1 if isinstance(dim, Extent) else dim for dim in shape]
