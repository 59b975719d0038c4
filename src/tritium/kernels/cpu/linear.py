"""linear, alone or with an activation, compiled (csrc/linear.cpp): the weight packed once, one layout for all rows."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritium.kernels.cpu import library
from tritium.kernels.cpu.activations import refuse_kind
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.kernel import Thunk
from tritium.ops.activations import KINDS


class LinearArgs(ctypes.Structure):
    """csrc/linear.cpp LinearArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "kind")),
        ("is_gated", ctypes.c_int32),
    ]


class LinearPackArgs(ctypes.Structure):
    """csrc/linear.cpp LinearPackArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out")),
        *((name, ctypes.c_int64) for name in ("num_in", "num_out", "stride")),
        ("is_gated", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the layout of csrc/linear.h: panels of outputs, filled up with zeros.

    num_out: what the linear writes: half of the weight's rows when it is gated.
    """

    data: torch.Tensor
    num_out: int
    num_in: int
    is_gated: bool = False


def supports(args: Mapping[str, Any]) -> str | None:
    """x, weight and bias of one dtype."""
    return library.refuse({name: args.get(name) for name in ("x", "weight_NK", "bias")})


def supports_activation(args: Mapping[str, Any]) -> str | None:
    """The same, and a kind of activation that csrc knows."""
    return refuse_kind(args["kind"]) or supports(args)


def pack_weight(weight_NK: torch.Tensor) -> PackedWeight:
    """The weight as `bind` takes it. Memory: the packed form, at most 31 outputs and 31 inputs larger."""
    return _packed(weight_NK, is_gated=False)


def pack_gated(weight_NK: torch.Tensor) -> PackedWeight:
    """The weight of a gated linear, gates before what they gate, with both side by side in every panel."""
    return _packed(weight_NK, is_gated=True)


def _packed(weight_NK: torch.Tensor, *, is_gated: bool) -> PackedWeight:
    if weight_NK.shape[1] > 1 and weight_NK.stride(1) != 1:
        weight_NK = weight_NK.contiguous()
    num_out, num_in = weight_NK.shape
    data = torch.empty(library.packed_size(num_out, num_in, weight_NK.dtype, is_gated=is_gated), dtype=weight_NK.dtype)
    struct = LinearPackArgs(weight_NK.data_ptr(), data.data_ptr(), num_in, num_out, weight_NK.stride(0), is_gated)
    library.thunk("linear_pack", weight_NK.dtype, struct)()
    return PackedWeight(data, num_out // 2 if is_gated else num_out, num_in, is_gated)


def bind(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.linear, linear_activation or linear_gated of a packed weight, into outputs[0], which is dense."""
    reads, out, weight = Reads(), dense_output(outputs[0]), args["weight_NK"]
    x, rows = reads.rows(args["x"])
    bias = None if args.get("bias") is None else reads.dense(args["bias"])
    pointers = (x.data_ptr(), weight.data.data_ptr(), bias.data_ptr() if bias is not None else None, out.data_ptr())
    kind = KINDS.index(args["kind"]) if "kind" in args else -1
    struct = LinearArgs(*pointers, *rows, weight.num_in, weight.num_out, kind, weight.is_gated)
    kept = (x, weight.data, out, *([] if bias is None else [bias]))
    return reads.before(library.thunk("linear", x.dtype, struct, *kept))
