"""rms_norm and layer_norm, compiled (csrc/rms_norm.cpp, csrc/layer_norm.cpp)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.cpu import library
from tritium.kernels.cpu.layout import dense, rows_of
from tritium.kernels.kernel import Thunk


class RmsNormArgs(ctypes.Structure):
    """csrc/rms_norm.cpp RmsNormArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner", "size")),
        *((name, ctypes.c_float) for name in ("eps", "weight_offset")),
        ("cast_before_weight", ctypes.c_int32),
    ]


def supports_rms_norm(args: Mapping[str, Any]) -> str | None:
    """x and weight of one dtype."""
    return library.refuse({"x": args["x"], "weight": args["weight"]})


def bind_rms_norm(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rms_norm(x, weight) into outputs[0], which is dense."""
    x, weight, out = args["x"], dense("weight", args["weight"]), dense("out", outputs[0])
    rows = rows_of("x", x)
    struct = RmsNormArgs(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        num_outer=rows.num_outer,
        num_inner=rows.num_inner,
        stride_outer=rows.stride_outer,
        stride_inner=rows.stride_inner,
        size=x.shape[-1],
        eps=args["eps"],
        weight_offset=args.get("weight_offset", 0.0),
        cast_before_weight=args.get("cast_before_weight", True),
    )
    return library.thunk("rms_norm", x.dtype, struct, x, weight, out)
