"""all_reduce and all_gather over the launch context's communicator.

Both gather. A ring that adds on its way would sum an element in an order that depends on its place in the batch; ranks
in order give every row the same bits in any company.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.communicator import Communicator
from tritium.kernels.kernel import LaunchContext, Thunk


def bind_all_reduce(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None) -> Thunk:
    """ops.all_reduce into outputs[0]."""
    ranks, x, out = _communicator("all_reduce", context), args["x"], outputs[0]
    parts = [torch.empty_like(out) for _ in range(ranks.num_ranks)]
    total = torch.empty_like(out, dtype=torch.float32)

    def thunk() -> None:
        ranks.all_gather(parts, x)
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)

    return thunk


def bind_all_gather(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext | None) -> Thunk:
    """ops.all_gather into outputs[0]."""
    ranks, x = _communicator("all_gather", context), args["x"]
    if ranks.num_ranks != args["num_ranks"]:
        raise KernelError(f"all_gather is of {args['num_ranks']} ranks, the communicator connects {ranks.num_ranks}")
    parts = [torch.empty_like(x) for _ in range(ranks.num_ranks)]
    places = outputs[0].chunk(ranks.num_ranks, dim=-1)

    def thunk() -> None:
        ranks.all_gather(parts, x)
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)

    return thunk


def _communicator(op: str, context: LaunchContext | None) -> Communicator:
    if context is None or context.communicator is None:
        raise KernelError(f"{op} needs a communicator in its launch context: open the engine with one")
    return context.communicator
