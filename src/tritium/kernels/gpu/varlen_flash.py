"""varlen_attention by FlashAttention, as torch brings it; for GPUs and sizes where it is the faster one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.gpu.varlen import check_layout
from tritium.kernels.kernel import LaunchContext, Thunk

_flash = torch.ops.aten._flash_attention_forward


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext) -> Thunk:
    """ops.varlen_attention without a cap into outputs[0]; its rows past batch_counts[1] are unspecified.

    cu_seqlens_q must go on with the number of tokens behind the last sequence: those are sequences without tokens.
    """
    q, k, v, out, starts, _ = check_layout(args, outputs[0])
    scale = float(args["scale"])

    def thunk() -> None:
        sequences, longest = context.num_prefills, context.longest_prefill
        if sequences:
            since = starts[: sequences + 1]
            out.copy_(_flash(q, k, v, since, since, longest, longest, 0.0, False, False, scale=scale)[0])

    return thunk
