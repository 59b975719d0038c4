"""paged_attention whose sequences of one token are FlashInfer's, where the package is installed.

Never a default: the tuner says where it is faster. Chunks of prompts are `attention`'s, and so are single tokens that
FlashInfer cannot take.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.gpu import attention, flashinfer_decode
from tritium.kernels.kernel import LaunchContext, Thunk


def bind(
    args: Mapping[str, Any], outputs: Sequence[torch.Tensor], context: LaunchContext, *, single_tokens: str = ""
) -> Thunk:
    """ops.paged_attention without window, cap or slopes into outputs[0]. single_tokens: "own" for `attention`'s."""
    singles = None if single_tokens else flashinfer_decode.bind(args, outputs[0], context)
    return attention.bind(args, outputs, context, singles=singles)
