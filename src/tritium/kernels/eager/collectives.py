"""all_reduce and all_gather over the launch context's communicator.

Both gather. A ring that adds on its way would sum an element in an order that depends on its place in the batch; ranks
in order give every row the same bits in any company.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.communicator import Communicator
from tritium.kernels.kernel import LaunchContext, Thunk


def bind_all_reduce(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None) -> Thunk:
    """ops.all_reduce into outputs[0]."""
    context, ranks = _connected("all_reduce", context)
    x, out = args["x"], outputs[0]
    parts = _scratch(context, "parts", (ranks.num_ranks, *out.shape), out)
    total = _scratch(context, "total", tuple(out.shape), out, torch.float32)

    def thunk() -> None:
        ranks.all_gather(parts, x)
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)

    return thunk


def bind_all_gather(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None) -> Thunk:
    """ops.all_gather into outputs[0]."""
    context, ranks = _connected("all_gather", context)
    x, out = args["x"], outputs[0]
    if ranks.num_ranks != args["num_ranks"]:
        raise KernelError(f"all_gather is of {args['num_ranks']} ranks, the communicator connects {ranks.num_ranks}")
    parts = _scratch(context, "parts", (ranks.num_ranks, *x.shape), x)
    places = out.unflatten(-1, (ranks.num_ranks, -1)).movedim(-2, 0)

    def thunk() -> None:
        ranks.all_gather(parts, x)
        places.copy_(parts)

    return thunk


def scratch_len(count: int) -> int:
    """Elements that are kept for a tensor of `count`."""
    return 1 << max(0, count - 1).bit_length()


def _scratch(
    context: LaunchContext, name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Memory that steps share, for what no step leaves behind: one piece for each power of two, so that all together
    take less than twice the largest."""
    count, dtype = math.prod(shape), dtype or like.dtype
    key = (name, scratch_len(count), dtype)
    if key not in context.scratch:
        context.scratch[key] = torch.empty(scratch_len(count), dtype=dtype, device=like.device)
    return context.scratch[key][:count].view(shape)


def _connected(op: str, context: LaunchContext | None) -> tuple[LaunchContext, Communicator]:
    if context is None or context.communicator is None:
        raise KernelError(f"{op} needs a communicator in its launch context: open the engine with one")
    return context, context.communicator
