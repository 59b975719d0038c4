"""Write every change of view in one of four forms.

Matches: view, reshape, flatten, unflatten, squeeze, unsqueeze, transpose, permute, t, movedim, select, narrow, slice,
    split, chunk, unbind, expand, repeat_interleave and their relatives, in every overload and keyword form.
Replaces with: `aten.view` (sizes from the result; -1 for the one that depends on the batch), `aten.permute`,
    `aten.slice.Tensor` (non-negative start and end), `aten.expand` (-1 for sizes that stay). A view of a view of the
    same kind becomes one; one that changes nothing goes, and so does one that is not read any more. What cannot be
    written so (two sizes that depend on the batch, a cut along the tokens) stays as it is, for the locality proof to
    refuse.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent
from tritium.graph.edit import arguments, insert, replace
from tritium.graph.spec import Dim, Spec, args_of, has_spec, spec_of
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.result import PassResult

aten = torch.ops.aten
VIEW, PERMUTE, SLICE, EXPAND = aten.view.default, aten.permute.default, aten.slice.Tensor, aten.expand.default
CANONICAL = (VIEW, PERMUTE, SLICE, EXPAND)

RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
    aten.reshape_as.default,
}  # fmt: skip
EXPANSIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
SPLITS = {
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.tensor_split.sections,
}  # fmt: skip


def canonicalise_views(graph: fx.Graph) -> PassResult:
    """See the module's docstring."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            new = _rewritten(node)
        if new is not None and new is not node:
            replace(node, new)
            count += 1
    remove_dead_code(graph)  # a slice of which others were cut, and now are of what it was cut of
    return PassResult(count)


def _rewritten(node: fx.Node) -> fx.Node | None:
    """The canonical node that `node` becomes, or None."""
    if node.target in RESHAPES:
        return _view(node, args_of(node)[0], spec_of(node).shape)
    if node.target is PERMUTE and len(node.args) == 2:
        return _permute(node, args_of(node)[0], _positive(args_of(node)[1], spec_of(node).rank))
    if node.target in PERMUTATIONS:
        return _permute(node, args_of(node)[0], PERMUTATIONS[node.target](node, spec_of(node).rank))
    if node.target in EXPANSIONS:
        return _expand(node, args_of(node)[0], spec_of(node).shape)
    if node.target is SLICE:
        _, dim, start, end, step = arguments(node).values()
        return _slice(node, args_of(node)[0], dim, start or 0, end, step)
    if node.target is aten.narrow.default:
        _, dim, start, length = args_of(node)
        return _slice(node, args_of(node)[0], dim, start, start + length if isinstance(length, int) else length, 1)
    if node.target is aten.select.int:
        _, dim, index = args_of(node)
        return _select(node, args_of(node)[0], dim, index)
    if node.target is aten.repeat_interleave.self_int:
        return _repeat(node)
    if node.target is operator.getitem and args_of(node)[0].target in SPLITS:
        return _piece(node, args_of(node)[0], args_of(node)[1])
    return None


def _view(node: fx.Node, x: fx.Node, shape: tuple[Dim, ...]) -> fx.Node | None:
    while x.target is VIEW:
        x = args_of(x)[0]
    if spec_of(x).shape == shape:
        return x
    batch = [dim for dim in shape if isinstance(dim, Extent)]
    if len(batch) > 1 or len(spec_of(x).batch_dims) > 1:
        return None
    return _call(node, VIEW, (x, [-1 if isinstance(dim, Extent) else dim for dim in shape]), shape)


def _permute(node: fx.Node, x: fx.Node, dims: list[int]) -> fx.Node | None:
    while x.target is PERMUTE:
        dims = [args_of(x)[1][d] for d in dims]
        x = args_of(x)[0]
    if dims == list(range(len(dims))):
        return x
    kept = [d for d in dims if spec_of(x).shape[d] != 1]
    if kept == sorted(kept):  # only sizes of 1 move
        return _view(node, x, tuple(spec_of(x).shape[d] for d in dims))
    return _call(node, PERMUTE, (x, dims), tuple(spec_of(x).shape[d] for d in dims))


def _expand(node: fx.Node, x: fx.Node, shape: tuple[Dim, ...]) -> fx.Node | None:
    old = (1,) * (len(shape) - spec_of(x).rank) + spec_of(x).shape
    if old == shape:
        return _view(node, x, shape)
    if any(isinstance(new, Extent) and was != new for was, new in zip(old, shape, strict=True)):
        return None
    if spec_of(x).rank < len(shape):
        viewed = _view(node, x, old)
        if viewed is None:
            return None
        x = viewed
    return _call(node, EXPAND, (x, [-1 if was == new else new for was, new in zip(old, shape, strict=True)]), shape)


def _repeat(node: fx.Node) -> fx.Node | None:
    """Each element n times in a row along one dimension: a new dimension, expanded and merged."""
    a, shape = arguments(node), spec_of(args_of(node)[0]).shape
    dim, repeats = a["dim"], a["repeats"]
    if dim is None or not isinstance(repeats, int) or isinstance(shape[dim], Extent):
        return None
    dim %= len(shape)
    x = _view(node, a["self"], (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    repeated = _expand(node, x, (*shape[: dim + 1], repeats, *shape[dim + 1 :])) if x is not None else None
    return _view(node, repeated, spec_of(node).shape) if repeated is not None else None


def _slice(node: fx.Node, x: fx.Node, dim: int, start: Any, end: Any, step: Any) -> fx.Node | None:
    shape = spec_of(x).shape
    dim %= len(shape)
    size = shape[dim]
    if start == 0 and step == 1 and spec_of(node).shape == shape:
        return x
    if isinstance(size, Extent) or not all(isinstance(n, int) for n in (start, step)):
        return None
    end = size if end is None else end
    if not isinstance(end, int):
        return None
    start, end, step = slice(start, end, step).indices(size)
    length = len(range(start, end, step))
    if length == size:
        return x
    if x.target is SLICE and args_of(x)[1] == dim and args_of(x)[4] == 1:
        start, end, x = start + args_of(x)[2], end + args_of(x)[2], args_of(x)[0]
    return _call(node, SLICE, (x, dim, start, end, step), (*shape[:dim], length, *shape[dim + 1 :]))


def _select(node: fx.Node, x: fx.Node, dim: int, index: int) -> fx.Node | None:
    shape = spec_of(x).shape
    dim %= len(shape)
    size = shape[dim]
    if isinstance(size, Extent) or not isinstance(index, int):
        return None
    piece = _slice(node, x, dim, index % size, index % size + 1, 1)
    return _view(node, piece, (*shape[:dim], *shape[dim + 1 :])) if piece is not None else None


def _piece(node: fx.Node, split: fx.Node, index: int) -> fx.Node | None:
    """One output of a split, as a slice."""
    x, specs = args_of(split)[0], split.meta["spec"]
    if split.target is aten.unbind.int:
        return _select(node, x, arguments(split)["dim"], index)
    dim = arguments(split)["dim"] % spec_of(x).rank
    sizes = [spec.shape[dim] for spec in specs]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return _slice(node, x, dim, start, start + sizes[index], 1)


def _call(node: fx.Node, target: Any, args: tuple[Any, ...], shape: tuple[Dim, ...]) -> fx.Node:
    if node.target is target and node.args == args:
        return node
    return insert(node.graph, target, args, Spec(spec_of(node).dtype, shape), like=node, covers=[node])


def _positive(dims: Any, rank: int) -> list[int]:
    return [d % rank for d in dims]


def _swap(node: fx.Node, rank: int) -> list[int]:
    dims = list(range(rank))
    a, b = (d % rank for d in args_of(node)[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _last_two(node: fx.Node, rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else list(range(rank))


def _reversed(node: fx.Node, rank: int) -> list[int]:
    return list(range(rank))[::-1]


def _moved(node: fx.Node, rank: int) -> list[int]:
    sources, destinations = ([x] if isinstance(x, int) else x for x in args_of(node)[1:3])
    sources, destinations = _positive(sources, rank), _positive(destinations, rank)
    rest = iter(d for d in range(rank) if d not in sources)
    return [sources[destinations.index(i)] if i in destinations else next(rest) for i in range(rank)]


PERMUTATIONS: dict[Any, Callable[[fx.Node, int], list[int]]] = {
    aten.transpose.int: _swap,
    aten.swapaxes.default: _swap,
    aten.swapdims.default: _swap,
    aten.t.default: _last_two,
    aten.mT.default: _last_two,
    aten.adjoint.default: _last_two,
    aten.numpy_T.default: _reversed,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
}


def is_view(node: object) -> bool:
    """True for a canonical change of view."""
    return isinstance(node, fx.Node) and node.target in CANONICAL and has_spec(node)
