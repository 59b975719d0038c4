"""moe and experts, compiled (csrc/moe.cpp): each expert's weights packed once, as a linear's are."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritium.kernels.cpu import library, memory
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.cpu.linear import pack_weight
from tritium.kernels.kernel import Thunk
from tritium.ops.activations import KINDS

MOST_EXPERTS = 1024  # csrc/moe.cpp kMostExperts


class MoeArgs(ctypes.Structure):
    """csrc/moe.cpp MoeArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "router", "gate", "up", "down", "out", "chosen", "chosen_weights")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "x_stride", "router_stride", "num_in", "num_hidden")),
        *((name, ctypes.c_int64) for name in ("num_experts", "top_k", "is_normed", "kind", "has_wide_weights")),
    ]


@dataclass(frozen=True)
class PackedExperts:
    """Weights [E, num_out, num_in], each expert's in the layout of csrc/linear.h, one after the other."""

    data: torch.Tensor
    num_experts: int
    num_in: int


def supports_moe(args: Mapping[str, Any]) -> str | None:
    """One dtype; at most 1024 experts, and at least as many as a token chooses."""
    names = ("x_TD", "router_TE", "gate_up_EGD", "down_EDF")
    if reason := library.refuse({name: args[name] for name in names}):
        return reason
    num_experts = args["router_TE"].shape[1]
    if num_experts > MOST_EXPERTS:
        return f"there are {num_experts} experts, more than {MOST_EXPERTS}"
    if not 1 <= args["top_k"] <= num_experts:
        return f"a token cannot choose {args['top_k']} of {num_experts} experts"
    return None


def supports_experts(args: Mapping[str, Any]) -> str | None:
    """One dtype, in which the tokens' weights may be, or in float32; at most 1024 experts."""
    if reason := library.refuse({name: args[name] for name in ("x_TD", "gate_up_EGD", "down_EDF")}):
        return reason
    chosen, weights, num_experts = args["chosen_TJ"].dtype, args["weights_TJ"].dtype, args["down_EDF"].shape[0]
    if chosen != torch.int64 or weights not in (torch.float32, args["x_TD"].dtype):
        return f"experts are chosen in {str(chosen)[6:]} with weights in {str(weights)[6:]}"
    return f"there are {num_experts} experts, more than {MOST_EXPERTS}" if num_experts > MOST_EXPERTS else None


def pack_experts(weight_ENK: torch.Tensor) -> PackedExperts:
    """One weight of every expert."""
    num_experts, num_out, num_in = weight_ENK.shape
    size = library.packed_size(num_out, num_in, weight_ENK.dtype)
    data = memory.for_packed(num_experts * size, weight_ENK.dtype).view(num_experts, size)
    for expert in range(num_experts):
        data[expert] = pack_weight(weight_ENK[expert]).data
    return PackedExperts(data, num_experts, num_in)


def pack_gate_up(gate_up_EGD: torch.Tensor) -> tuple[PackedExperts, PackedExperts]:
    """The gate's rows and the up projection's, apart."""
    gate, up = gate_up_EGD.chunk(2, dim=1)
    return pack_experts(gate), pack_experts(up)


def bind_moe(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.moe with packed weights into outputs[0], which is dense."""
    reads = Reads()
    router = reads.adjacent(args["router_TE"])
    choice = {"router": router.data_ptr(), "router_stride": router.stride(0), "is_normed": args["is_normed"]}
    return _bound(args, outputs, reads, (router,), top_k=args["top_k"], **choice)


def bind_experts(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.experts with packed weights into outputs[0], which is dense. An expert that there is not gives NaN."""
    reads = Reads()
    chosen, weights = (reads.dense(args[name]) for name in ("chosen_TJ", "weights_TJ"))
    choice = {"chosen": chosen.data_ptr(), "chosen_weights": weights.data_ptr()}
    is_wide = weights.dtype == torch.float32
    return _bound(args, outputs, reads, (chosen, weights), top_k=chosen.shape[1], has_wide_weights=is_wide, **choice)


def _bound(
    args: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    reads: Reads,
    chosen_by: tuple[torch.Tensor, ...],
    **choice: int,
) -> Thunk:
    """The call for what both ops have; `choice`: the fields that say who chooses."""
    out, (gate, up), down = dense_output(outputs[0]), args["gate_up_EGD"], args["down_EDF"]
    x = reads.adjacent(args["x_TD"])
    struct = MoeArgs(
        x=x.data_ptr(),
        gate=gate.data.data_ptr(),
        up=up.data.data_ptr(),
        down=down.data.data_ptr(),
        out=out.data_ptr(),
        num_tokens=x.shape[0],
        x_stride=x.stride(0),
        num_in=x.shape[1],
        num_hidden=down.num_in,
        num_experts=down.num_experts,
        kind=KINDS.index(args["kind"]),
        **choice,
    )
    return reads.before(library.thunk("moe", x.dtype, struct, x, gate.data, up.data, down.data, out, *chosen_by))
