"""What a call returns, found by running it on meta tensors of two lengths: sizes are linear in the number of tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tritium.engine.plan import Extent, Sizes
from tritium.errors import CaptureError
from tritium.graph.spec import Dim, Spec, spec_of

LENGTHS = (1009, 1013)  # primes that no model has as a size


def infer(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Spec:
    """The spec of `target(*args, **kwargs)` whose tensor arguments are nodes. For ops with one tensor as result.

    Raises `CaptureError` for a result of which a size is not linear in the number of tokens.
    """
    first, second = (_run(target, args, kwargs, length) for length in LENGTHS)
    shape = tuple(_dim(target, a, b) for a, b in zip(first.shape, second.shape, strict=True))
    return Spec(first.dtype, shape)


def _run(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], length: int) -> torch.Tensor:
    sizes = Sizes(tokens=length, sequences=1, rows=1)

    def value(node: fx.Node) -> torch.Tensor | int:
        if isinstance(node.meta["spec"], Extent):
            return node.meta["spec"].at(sizes)
        spec = spec_of(node)
        shape = [dim.at(sizes) if isinstance(dim, Extent) else dim for dim in spec.shape]
        return torch.empty(shape, dtype=spec.dtype, device="meta")

    return target(*fx.node.map_arg(args, value), **fx.node.map_arg(dict(kwargs), value))


def _dim(target: Any, first: int, second: int) -> Dim:
    tokens, rest = divmod(second - first, LENGTHS[1] - LENGTHS[0])
    constant = first - tokens * LENGTHS[0]
    if rest or constant < -first:  # T * T lies on a line too, one far below it at 0 tokens
        raise CaptureError(
            f"{target}: a size of its result is {first} for {LENGTHS[0]} tokens and {second} for {LENGTHS[1]}; sizes "
            "must be a number, or a multiple of the number of tokens plus a number: write the model without this one"
        )
    return Extent(tokens=tokens, constant=constant) if tokens else first
