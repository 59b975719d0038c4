"""embedding, gather_rows and kv_store, compiled (csrc/copies.cpp): copies of bytes, whatever the dtype; and
quantized_embedding, whose rows are int8."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.cpu.layout import Reads, dense_output
from tritium.kernels.kernel import Thunk
from tritium.ops.quantized import SCALE_BYTES


class GatherRowsArgs(ctypes.Structure):
    """csrc/copies.cpp GatherRowsArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "rows", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "stride_row", "row_bytes", "num_source_rows")),
    ]


class QuantizedEmbeddingArgs(ctypes.Structure):
    """csrc/copies.cpp QuantizedEmbeddingArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "ids", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "stride_row", "row_size", "num_rows")),
    ]


class KVStoreArgs(ctypes.Structure):
    """csrc/copies.cpp KVStoreArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "cache", "slots")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "block_size", "head_bytes")),
        *((name, ctypes.c_int64) for name in ("k_stride_token", "k_stride_head", "v_stride_token", "v_stride_head")),
        ("stride_block", ctypes.c_int64),
    ]


def supports_embedding(args: Mapping[str, Any]) -> str | None:
    """One list of ids in int64."""
    return library.why_not() or _refuse_rows("ids_T", args["ids_T"])


def supports_gather_rows(args: Mapping[str, Any]) -> str | None:
    """Two dimensions, row numbers in int64."""
    return library.why_not() or _refuse_rows("rows_R", args["rows_R"])


def bind_embedding(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.embedding(ids, weight) into outputs[0]. An id that the weight has no row for gives a row of NaN."""
    return _bind_gather(args["weight_VD"], args["ids_T"], outputs[0])


def supports_quantized_embedding(args: Mapping[str, Any]) -> str | None:
    """One list of ids in int64, a table in int8, scales in fp32, and a floating dtype to give."""
    qweight, scales = args["qweight_VD"], args["scales_V1"]
    if qweight.dtype != torch.int8 or scales.dtype != torch.float32:
        return f"it has no code for a table in {str(qweight.dtype)[6:]} with scales in {str(scales.dtype)[6:]}"
    if getattr(torch, args["dtype"], None) not in library.SUFFIXES:
        return f"dtype is {args['dtype']}, which it has no code for"
    return library.why_not() or _refuse_rows("ids_T", args["ids_T"])


def bind_quantized_embedding(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.quantized_embedding into outputs[0]. An id that the table has no row for gives a row of NaN."""
    reads, out = Reads(), dense_output(outputs[0])
    qweight, scales = reads.adjacent(args["qweight_VD"]), reads.dense(args["scales_V1"])
    ids = reads.dense(args["ids_T"])
    shape = (ids.shape[0], qweight.stride(0), qweight.shape[1], qweight.shape[0])
    struct = QuantizedEmbeddingArgs(*(t.data_ptr() for t in (qweight, scales, ids, out)), *shape)
    return reads.before(library.thunk("quantized_embedding", out.dtype, struct, qweight, scales, ids, out))


def bind_gather_rows(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.gather_rows(x, rows) into outputs[0]. A number that x has no row for gives a row of NaN."""
    return _bind_gather(args["x_TD"], args["rows_R"], outputs[0])


def supports_kv_store(args: Mapping[str, Any]) -> str | None:
    """Keys, values and cache of one dtype, or the cache in int8 with room for scales; slots in int64."""
    k_TKH, v_TKH, cache, slots = (args[name] for name in ("k_TKH", "v_TKH", "cache_layer", "slot_mapping_T"))
    is_int8 = cache.dtype == torch.int8 and k_TKH.dtype in library.SUFFIXES
    if not (k_TKH.dtype == v_TKH.dtype and (is_int8 or k_TKH.dtype == cache.dtype)):
        return f"the dtypes differ: k {k_TKH.dtype}, v {v_TKH.dtype}, cache {cache.dtype}"
    if cache.shape[4] != k_TKH.shape[2] + (SCALE_BYTES if is_int8 else 0):
        return f"k has heads of {k_TKH.shape[2]}, the cache rows of {cache.shape[4]} in {cache.dtype}"
    return library.why_not() or _refuse_rows("slot_mapping_T", slots)


def bind_kv_store(args: Mapping[str, Any], outputs: Sequence[torch.Tensor]) -> Thunk:
    """ops.kv_store: k and v may be strided in tokens and heads, the cache in blocks. Slots are not checked."""
    reads, cache = Reads(), args["cache_layer"]
    k_TKH, v_TKH = reads.adjacent(args["k_TKH"]), reads.adjacent(args["v_TKH"])
    slots = reads.dense(args["slot_mapping_T"])
    if not cache[0].is_contiguous():
        raise KernelError(f"a block of the cache is not dense: sizes {tuple(cache.shape)}, strides {cache.stride()}")
    size = k_TKH.element_size()
    num_tokens, num_heads, head_size = k_TKH.shape
    strides = (*k_TKH.stride()[:2], *v_TKH.stride()[:2])
    struct = KVStoreArgs(
        *(t.data_ptr() for t in (k_TKH, v_TKH, cache, slots)),
        *(num_tokens, num_heads, cache.shape[3], head_size * size),
        *(stride * size for stride in strides),
        cache.stride(0) * cache.element_size(),
    )
    name, dtype = ("kv_store_int8", k_TKH.dtype) if cache.dtype == torch.int8 else ("kv_store", None)
    return reads.before(library.thunk(name, dtype, struct, k_TKH, v_TKH, cache, slots))


def _bind_gather(x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> Thunk:
    reads, out, size = Reads(), dense_output(out), x.element_size()
    x, rows = reads.adjacent(x), reads.dense(rows)
    shape = (rows.shape[0], x.stride(0) * size, x.shape[1] * size, x.shape[0])
    struct = GatherRowsArgs(*(t.data_ptr() for t in (x, rows, out)), *shape)
    return reads.before(library.thunk("gather_rows", None, struct, x, rows, out))


def _refuse_rows(name: str, rows: Any) -> str | None:
    if rows.dtype != torch.int64 or len(rows.shape) != 1:
        return f"{name} is {rows.dtype} with {len(rows.shape)} dimensions, not a list of int64"
    return None
