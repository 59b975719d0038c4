"""Let the op that reads an fp8 linear add its bias: behind cuBLASLt a bias is a launch and a pass over memory more.

Matches: `tritium.linear_fp8(..., bias)` of which each reader is an activation (`activation_fp8`, or what
    `activation_pair_fp8` activates), an `add_layer_norm_fp8`, a sum that only such a norm reads, or a slice: of a part
    whose bias is zeros, or read by activations alone.
Replaces with: the same without a bias; activations take their part, `add_layer_norm_fp8` the whole. What was rounded to
    the linear's dtype between product, bias and next op is not rounded any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tritium.graph.derived import insert_weight, recipe_of
from tritium.graph.spec import args_of, spec_of
from tritium.weights.recipes import Concat, Recipe, Slice, Zeros

_OURS = torch.ops.tritium
LINEAR = _OURS.linear_fp8.default
ACTIVATIONS = (_OURS.activation_fp8.default, _OURS.activation_pair_fp8.default)
NORM = _OURS.add_layer_norm_fp8.default
ADD = torch.ops.aten.add.Tensor
SLICE = torch.ops.aten.slice.Tensor
_BIAS = 4  # linear_fp8's argument
# Which arguments an op adds a bias to, and which one that is.
_PLACES: dict[object, tuple[tuple[int, ...], int]] = {
    ACTIVATIONS[0]: ((0,), 1),
    ACTIVATIONS[1]: ((1,), 2),
    NORM: ((0, 1), 2),
}


@dataclass(frozen=True)
class _Taker:
    """An op that can add elements start to stop of a bias."""

    node: fx.Node
    start: int
    stop: int


def move_biases(graph: fx.Graph) -> int:
    """See the module's docstring. Returns how many were moved."""
    moved = 0
    for node in [node for node in graph.nodes if node.target is LINEAR]:
        bias = args_of(node)[_BIAS]
        takers = None if bias is None else _takers(node, recipe_of(bias))
        if takers is None:
            continue
        for taker in takers:
            taken = _part(graph, bias, taker)
            taker.node.update_arg(_PLACES[taker.node.target][1], taken)
        node.update_arg(_BIAS, None)
        moved += 1
    return moved


def _takers(node: fx.Node, bias: Recipe) -> list[_Taker] | None:
    """Who adds the bias in the linear's place; None: somebody reads the product who cannot."""
    width = int(spec_of(node).shape[-1])  # type: ignore[arg-type]
    found = []
    for user in node.users:
        if user.target is SLICE:
            start, stop = _range(user, width)
            if _is_zero(bias, start, stop, width):
                continue
            readers = [_taker(reader, user, start, stop) for reader in user.users]
            takers = [taker for taker in readers if taker is not None and taker.node.target in ACTIVATIONS]
            if len(takers) != len(readers):
                return None
        else:
            taker = _taker(user, node, 0, width)
            if taker is None:
                return None
            takers = [taker]
        found += takers
    return found


def _taker(user: fx.Node, value: fx.Node, start: int, stop: int) -> _Taker | None:
    if user.target is ADD and len(user.users) == 1 and _is_plain_sum(user):
        return _taker(next(iter(user.users)), user, start, stop)
    if user.target not in _PLACES:
        return None
    values, bias = _PLACES[user.target]
    args = args_of(user)
    is_added_to = any(args[i] is value for i in values) and sum(arg is value for arg in args) == 1
    return _Taker(user, start, stop) if is_added_to and args[bias] is None else None


def _is_plain_sum(node: fx.Node) -> bool:
    """Of two values of the sum's own type and sizes, neither scaled."""
    terms = args_of(node)[:2]
    is_plain = bool(node.kwargs.get("alpha", 1) == 1)
    return is_plain and all(isinstance(term, fx.Node) and spec_of(term) == spec_of(node) for term in terms)


def _range(node: fx.Node, width: int) -> tuple[int, int]:
    """What part of the last dimension a slice takes."""
    _, dim, start, stop = args_of(node)[:4]
    is_last = dim in (-1, spec_of(node).rank - 1)
    return (start or 0, min(stop, width)) if is_last else (0, width)


def _is_zero(bias: Recipe, start: int, stop: int, width: int) -> bool:
    """Elements start to stop come from zeros: seen from either end of the parts, as far as these are zeros."""
    parts = list(_parts(bias))
    return stop <= _num_leading_zeros(parts) or start >= width - _num_leading_zeros(parts[::-1])


def _parts(recipe: Recipe) -> Iterator[Recipe]:
    if isinstance(recipe, Concat):
        for part in recipe.parts:
            yield from _parts(part)
    else:
        yield recipe


def _num_leading_zeros(parts: list[Recipe]) -> int:
    count = 0
    for part in parts:
        if not isinstance(part, Zeros):
            break
        count += part.shape[0]
    return count


def _part(graph: fx.Graph, bias: fx.Node, taker: _Taker) -> fx.Node:
    width = spec_of(bias).shape[0]
    if (taker.start, taker.stop) == (0, width):
        return bias
    spec = spec_of(bias).with_shape((taker.stop - taker.start,))
    return insert_weight(graph, f"{bias.meta['name']}.part", Slice(recipe_of(bias), 0, taker.start, taker.stop), spec)
