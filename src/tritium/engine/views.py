"""What a plan's view values mean. The compiler checks with it on meta tensors what the runtime will do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tritium.engine.plan import Extent, Sizes
from tritium.errors import EngineError

VIEW_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "aten.view": lambda base, shape: base.view(shape),
    "aten.expand": lambda base, shape: base.expand(shape),
    "aten.permute": lambda base, dims: base.permute(dims),
    "aten.slice": torch.ops.aten.slice.Tensor,
}


def view_of(base: torch.Tensor, op: str, args: Sequence[Any], sizes: Sizes) -> torch.Tensor:
    """`op` applied to `base`; text in `args` is a size of the batch.

    Raises `EngineError` for an unknown op, torch's RuntimeError when the elements do not lie in the order it needs.
    """
    if op not in VIEW_OPS:
        raise EngineError(f"{op!r} is not a view this runtime knows ({', '.join(VIEW_OPS)}); build the engine again")
    return VIEW_OPS[op](base, *(_literal(arg, sizes) for arg in args))


def _literal(arg: Any, sizes: Sizes) -> Any:
    if isinstance(arg, str):
        return Extent.parse(arg).at(sizes)
    if isinstance(arg, (list, tuple)):
        return [_literal(item, sizes) for item in arg]
    return arg
