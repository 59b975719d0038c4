"""Move permutations down, so that heads-first and tokens-first code become one graph.

Matches: an element-wise op, a slice or a concatenation, of which an argument is `aten.permute(x, dims)`.
Replaces with: `aten.permute(op(x, ...), dims)`, where an element-wise op's other arguments have the same permutation
    or broadcast along what it moves. What follows is most often the opposite permutation, and both go (views.py).
"""

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.edit import insert_inferred
from tritium.graph.spec import args_of, has_spec, spec_of
from tritium.graph.vocabulary import POINTWISE
from tritium.passes.result import PassResult
from tritium.passes.sinking import rewrite_calls

aten = torch.ops.aten
VIEW, PERMUTE, SLICE = aten.view.default, aten.permute.default, aten.slice.Tensor


def sink_permutes(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    return rewrite_calls(graph, _sunk)


def _sunk(node: fx.Node) -> fx.Node | None:
    args = args_of(node)
    if node.target in POINTWISE:
        return _pointwise(node)
    if node.target is SLICE and args[0].target is PERMUTE:
        x, dims = args_of(args[0])
        inner = insert_inferred(node.graph, SLICE, (x, dims[args[1]], *args[2:]), like=node)
        return insert_inferred(node.graph, PERMUTE, (inner, dims), like=node)
    if node.target is aten.cat.default and all(t.target is PERMUTE for t in args[0]):
        dims = args_of(args[0][0])[1]
        if all(args_of(t)[1] == dims for t in args[0]):
            dim = dims[args[1] % len(dims)] - len(dims)
            inner = insert_inferred(node.graph, node.target, ([args_of(t)[0] for t in args[0]], dim), like=node)
            return insert_inferred(node.graph, PERMUTE, (inner, dims), like=node)
    return None


def _pointwise(node: fx.Node) -> fx.Node | None:
    """The op on the arguments before their permutation, then permuted."""
    rank = spec_of(node).rank
    tensors = [a for a in args_of(node) if has_spec(a)]
    dims = next((args_of(a)[1] for a in tensors if _is_permute(a) and spec_of(a).rank == rank), None)
    if dims is None or not all(_moves_nothing(a, dims) for a in tensors):
        return None
    args = tuple(_unpermuted(node, a, dims) if has_spec(a) else a for a in args_of(node))
    inner = insert_inferred(node.graph, node.target, args, like=node, kwargs=node.kwargs)
    return insert_inferred(node.graph, PERMUTE, (inner, dims), like=node)


def _moves_nothing(arg: fx.Node, dims: list[int]) -> bool:
    """True when undoing the permutation on `arg` puts no new one in its place: else the rule would never end."""
    if _is_permute(arg) and args_of(arg)[1] == dims:
        return True
    spec = spec_of(arg)
    shape = (1,) * (len(dims) - spec.rank) + spec.shape
    kept = [i for i in _inverse(dims) if shape[i] != 1]
    return kept == sorted(kept) and len(spec.batch_dims) <= 1


def _unpermuted(node: fx.Node, arg: fx.Node, dims: list[int]) -> fx.Node:
    """`arg`, broadcast to the op's rank, with the permutation undone."""
    if _is_permute(arg) and args_of(arg)[1] == dims:
        return args_of(arg)[0]
    spec = spec_of(arg)
    if all(size == 1 for size in spec.shape):
        return arg
    shape = (1,) * (len(dims) - spec.rank) + spec.shape
    sizes = [-1 if isinstance(shape[i], Extent) else shape[i] for i in _inverse(dims)]
    return insert_inferred(node.graph, VIEW, (arg, sizes), like=node)


def _inverse(dims: list[int]) -> list[int]:
    return [dims.index(i) for i in range(len(dims))]


def _is_permute(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is PERMUTE
