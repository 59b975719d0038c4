"""Move permutations down, so that heads-first and tokens-first code become one graph.

Matches: an element-wise op, a slice or a concatenation, of which an argument is `aten.permute(x, dims)`.
Replaces with: `aten.permute(op(x, ...), dims)`; an element-wise op's other arguments are permuted back, which is a mere
    view where they broadcast. What follows is most often the opposite permutation, and both go (views.py).
"""

from typing import Any

import torch
from torch import fx

from tritium.graph.edit import insert_inferred, replace
from tritium.graph.spec import args_of, has_spec, spec_of
from tritium.graph.vocabulary import POINTWISE
from tritium.passes.result import PassResult

aten = torch.ops.aten
VIEW, PERMUTE, SLICE = aten.view.default, aten.permute.default, aten.slice.Tensor


def sink_permutes(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and has_spec(node):
            with graph.inserting_before(node):
                new = _sunk(node)
            if new is not None:
                new.meta["covers"] = node.meta["covers"]
                replace(node, new)
                count += 1
    return PassResult(count)


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
    permuted = [a for a in node.args if _is_permute(a) and spec_of(a).rank == rank]  # type: ignore[arg-type]
    if not permuted:
        return None
    dims = args_of(permuted[0])[1]  # type: ignore[arg-type]
    back = [dims.index(i) for i in range(rank)]
    args = tuple(_unpermuted(node, a, back) if has_spec(a) else a for a in args_of(node))
    if any(a is None for a, old in zip(args, node.args, strict=True) if old is not None):
        return None
    inner = insert_inferred(node.graph, node.target, args, like=node, kwargs=node.kwargs)
    return insert_inferred(node.graph, PERMUTE, (inner, dims), like=node)


def _unpermuted(node: fx.Node, arg: fx.Node, back: list[int]) -> fx.Node | None:
    """`arg`, broadcast to the op's rank, with the permutation undone."""
    if _is_permute(arg) and [args_of(arg)[1].index(i) for i in range(len(back))] == back:
        return args_of(arg)[0]
    spec = spec_of(arg)
    if not spec.shape or all(size == 1 for size in spec.shape):
        return arg
    x: Any = arg
    if spec.rank < len(back):
        if len(spec.batch_dims) > 1:
            return None
        shape = [1] * (len(back) - spec.rank) + [-1 if i in spec.batch_dims else d for i, d in enumerate(spec.shape)]
        x = insert_inferred(node.graph, VIEW, (arg, shape), like=node)
    return insert_inferred(node.graph, PERMUTE, (x, back), like=node)


def _is_permute(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is PERMUTE
