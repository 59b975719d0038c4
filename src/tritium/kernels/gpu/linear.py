"""linear through cuBLAS, or by Triton's GEMM, written into place."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tritium.kernels.gpu import matmul
from tritium.kernels.kernel import Thunk


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor], *, by: str = "cublas") -> Thunk:
    """ops.linear(x, weight, bias) into outputs[0]; the bias is added in the epilogue. by: "cublas" or "triton"."""
    if by == "triton":
        return matmul.bind_fixed(args, outputs)
    x, weight_NK, bias, out = args["x"], args["weight_NK"], args.get("bias"), outputs[0]
    if bias is None:
        return partial(torch.mm, x, weight_NK.t(), out=out)
    return partial(torch.addmm, bias, x, weight_NK.t(), out=out)
