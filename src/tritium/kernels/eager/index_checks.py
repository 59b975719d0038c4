"""Indices of torch's own ops checked before a GPU reads by them: torch checks there in the kernel, whose failure ends
every use of the GPU by the process. On a CPU torch raises an `IndexError` itself. A check waits for the GPU."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

# By op: the argument that is indexed and the one that holds indices, along `dim`, or the first dimension.
_INDEXED = {
    "aten.embedding.default": ("weight", "indices"),
    "aten.embedding_bag.padding_idx": ("weight", "indices"),
    "aten.embedding_bag.default": ("weight", "indices"),
    "aten.index_select.default": ("self", "index"),
    "aten.gather.default": ("self", "index"),
    "aten.scatter.src": ("self", "index"),
    "aten.scatter.value": ("self", "index"),
    "aten.scatter_add.default": ("self", "index"),
}


def index_check(op: str, args: Mapping[str, Any]) -> Callable[[], None] | None:
    """What raises an `IndexError` when the op's indices, as they are then, are outside what they index; None for an op
    without indices."""
    ranges = list(_ranges(op, args))
    return partial(_check, ranges) if ranges else None


def _ranges(op: str, args: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Tensors of indices, each with the first index that is allowed and the first that is not."""
    if op == "aten.one_hot.default":
        if args.get("num_classes", -1) >= 0:
            yield args["self"], 0, args["num_classes"]
    elif op == "aten.index.Tensor":
        dim = 0
        for index in args["indices"]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                size = args["self"].shape[dim]
                dim += 1
                if index is not None:
                    yield index, -size, size
            else:
                dim += index.dim()
    elif op in _INDEXED:
        table, index = (args[name] for name in _INDEXED[op])
        yield index, 0, table.shape[args.get("dim", 0)]


def _check(ranges: list[tuple[torch.Tensor, int, int]]) -> None:
    for index, low, high in ranges:
        if bool(((index < low) | (index >= high)).any()):
            raise IndexError(f"an index is outside {low} to {high - 1}")
