"""linear through cuBLAS, written into place."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.kernels.kernel import Thunk


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear(x, weight, bias) into outputs[0]; the bias is added in cuBLASLt's epilogue."""
    x, weight_NK, bias, out = args["x"], args["weight_NK"], args.get("bias"), outputs[0]
    if bias is None:
        return partial(torch.mm, x, weight_NK.t(), out=out)
    return partial(torch.addmm, bias, x, weight_NK.t(), out=out)
