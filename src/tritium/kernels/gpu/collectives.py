"""all_reduce by NCCL: in an order of its own, which is faster than gathering every rank's numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.kernel import LaunchContext, Thunk


def bind_all_reduce(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext) -> Thunk:
    """ops.all_reduce into outputs[0]."""
    ranks: Any = context.communicator  # a `GpuCommunicator`, as every communicator on a GPU is
    if ranks is None:
        raise KernelError("all_reduce needs a communicator in its launch context: open the engine with one")
    x, out = args["x"], outputs[0]
    if not (x.is_contiguous() and out.is_contiguous()):
        raise KernelError(f"all_reduce: strides {x.stride()} and {out.stride()} of sizes {tuple(x.shape)}: not dense")
    return partial(ranks.all_reduce, out, x)
