"""rope_cos_sin, rope and rope_kv_store, compiled (csrc/rope.cpp)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.cpu.copies import supports_kv_store
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.kernel import Thunk


class RopeCosSinArgs(ctypes.Structure):
    """csrc/rope.cpp RopeCosSinArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("positions", "inv_freq", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_pairs")),
        ("attention_scaling", ctypes.c_float),
    ]


class RopeArgs(ctypes.Structure):
    """csrc/rope.cpp RopeArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos_sin", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "head_size", "num_pairs")),
        *((name, ctypes.c_int64) for name in ("stride_token", "stride_head")),
        ("interleaved", ctypes.c_int32),
    ]


class RopeKvStoreArgs(ctypes.Structure):
    """csrc/rope.cpp RopeKvStoreArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos_sin", "out", "cache", "slots")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_size", "num_pairs")),
        *((name, ctypes.c_int64) for name in ("block_size", "stride_block")),
        *((name, ctypes.c_int64) for x in "qkv" for name in (f"{x}_stride_token", f"{x}_stride_head")),
        *((name, ctypes.c_int32) for name in ("interleaved", "is_int8")),
    ]


def supports_rope_cos_sin(args: Mapping[str, Any]) -> str | None:
    """Positions in int64, frequencies in fp32."""
    if args["positions_T"].dtype != torch.int64:
        return f"positions_T is {args['positions_T'].dtype}, not int64"
    return library.refuse({"inv_freq_P": args["inv_freq_P"]}, (torch.float32,))


def bind_rope_cos_sin(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope_cos_sin into outputs[0], fp32 [T, 2P]."""
    reads, out = Reads(), dense_output(outputs[0])
    positions_T, inv_freq_P = reads.dense(args["positions_T"]), reads.dense(args["inv_freq_P"])
    struct = RopeCosSinArgs(
        positions_T.data_ptr(),
        inv_freq_P.data_ptr(),
        out.data_ptr(),
        *(positions_T.shape[0], inv_freq_P.shape[0]),
        args.get("attention_scaling", 1.0),
    )
    return reads.before(library.thunk("rope_cos_sin", None, struct, positions_T, inv_freq_P, out))


def supports_rope(args: Mapping[str, Any]) -> str | None:
    """Angles in fp32, no more pairs than a head has."""
    x_TNH, cos_sin = args["x_TNH"], args["cos_sin"]
    if cos_sin.dtype != torch.float32:
        return f"cos_sin is {cos_sin.dtype}, not float32"
    if cos_sin.shape[-1] > x_TNH.shape[-1]:
        return f"cos_sin rotates {cos_sin.shape[-1]} dimensions of heads of {x_TNH.shape[-1]}"
    return library.refuse({"x_TNH": x_TNH})


def bind_rope(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope(x, cos_sin) into outputs[0], dense; x may be strided in tokens and heads."""
    reads, out = Reads(), dense_output(outputs[0])
    x_TNH, cos_sin = reads.adjacent(args["x_TNH"]), reads.dense(args["cos_sin"])
    struct = RopeArgs(
        *(t.data_ptr() for t in (x_TNH, cos_sin, out)),
        *x_TNH.shape,
        cos_sin.shape[-1] // 2,
        *x_TNH.stride()[:2],
        args.get("interleaved", False),
    )
    return reads.before(library.thunk("rope", x_TNH.dtype, struct, x_TNH, cos_sin, out))


def supports_rope_kv_store(args: Mapping[str, Any]) -> str | None:
    """What rope and kv_store ask for; queries, keys, values and cache of one dtype, or the cache in int8."""
    q_TNH, cos_sin = args["q_TNH"], args["cos_sin"]
    return (
        supports_rope({"x_TNH": q_TNH, "cos_sin": cos_sin})
        or library.refuse({"q_TNH": q_TNH, "k_TKH": args["k_TKH"]})
        or supports_kv_store(args)
    )


def bind_rope_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.rope_kv_store: rotated queries into outputs[0], dense; q, k, v may be strided in tokens and heads."""
    reads, out, cache = Reads(), dense_output(outputs[0]), args["cache_layer"]
    q, k, v = (reads.adjacent(args[name]) for name in ("q_TNH", "k_TKH", "v_TKH"))
    cos_sin, slots = reads.dense(args["cos_sin"]), reads.dense(args["slot_mapping_T"])
    if not cache[0].is_contiguous():
        raise KernelError(f"a block of the cache is not dense: sizes {tuple(cache.shape)}, strides {cache.stride()}")
    num_tokens, num_heads, head_size = q.shape
    struct = RopeKvStoreArgs(
        *(t.data_ptr() for t in (q, k, v, cos_sin, out, cache, slots)),
        *(num_tokens, num_heads, k.shape[1], head_size, cos_sin.shape[-1] // 2, cache.shape[3], cache.stride(0)),
        *(stride for t in (q, k, v) for stride in t.stride()[:2]),
        *(args.get("interleaved", False), cache.dtype == torch.int8),
    )
    return reads.before(library.thunk("rope_kv_store", q.dtype, struct, q, k, v, cos_sin, out, cache, slots))
