"""activation and gated_activation, compiled (csrc/activations.cpp)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.kernels.cpu import library
from tritium.kernels.cpu.layout import Reads, dense_output, rows_alike
from tritium.kernels.kernel import Thunk
from tritium.ops.activations import KINDS


class ActivationArgs(ctypes.Structure):
    """csrc/activations.cpp ActivationArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "stride_outer", "stride_inner", "size")),
        ("kind", ctypes.c_int64),
    ]


class GatedActivationArgs(ctypes.Structure):
    """csrc/activations.cpp GatedActivationArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out")),
        *((name, ctypes.c_int64) for name in ("num_outer", "num_inner", "gate_stride_outer", "gate_stride_inner")),
        *((name, ctypes.c_int64) for name in ("up_stride_outer", "up_stride_inner", "size", "kind")),
    ]


def supports_activation(args: Mapping[str, Any]) -> str | None:
    """The kinds that csrc knows, in its three dtypes."""
    return refuse_kind(args["kind"]) or library.refuse({"x": args["x"]})


def bind_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.activation(x, kind) into outputs[0], dense."""
    reads, out = Reads(), dense_output(outputs[0])
    x, rows = reads.rows(args["x"])
    struct = ActivationArgs(x.data_ptr(), out.data_ptr(), *rows, x.shape[-1], KINDS.index(args["kind"]))
    return reads.before(library.thunk("activation", x.dtype, struct, x, out))


def supports_gated_activation(args: Mapping[str, Any]) -> str | None:
    """gate and up of one shape and dtype."""
    gate, up = args["gate"], args["up"]
    if tuple(gate.shape) != tuple(up.shape):
        return f"gate has sizes {tuple(gate.shape)}, up {tuple(up.shape)}"
    return refuse_kind(args["kind"]) or library.refuse({"gate": gate, "up": up})


def bind_gated_activation(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gated_activation(gate, up, kind) into outputs[0], dense."""
    reads, out = Reads(), dense_output(outputs[0])
    gate, up = args["gate"], args["up"]
    rows = rows_alike(gate, up)
    if rows is None:
        gate, up = reads.dense(gate), reads.dense(up)
        rows = rows_alike(gate, up)
    assert rows is not None
    struct = GatedActivationArgs(
        *(t.data_ptr() for t in (gate, up, out)),
        *rows[0],
        *rows[1][2:],
        gate.shape[-1],
        KINDS.index(args["kind"]),
    )
    return reads.before(library.thunk("gated_activation", gate.dtype, struct, gate, up, out))


def refuse_kind(kind: str) -> str | None:
    """Why csrc cannot apply an activation of this kind; None when it can."""
    return None if kind in KINDS else f"kind {kind!r} is not one of {', '.join(KINDS)}"
