"""csrc/decode_bytes.cu without a GPU: compiled as C++ with a warp of fibers (warp.h), against the op's reference."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tritium.ops.fp8 import FP8
from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import quantize_rows
from tritium.testing.attention_problems import Problem

Compiled = Callable[[str, dict[str, Any], str], ctypes.CDLL]
WARPS = 2
LENGTHS = (1, 33, 90)
CALL = """
static const void* in[7];
static void* out[2];
static i64 n[7];
static float scale;
static void call() {
    decode_bytes((const u16*)in[0], (const u8*)in[1], (u16*)out[0], (float*)out[1], (const float*)in[2],
                 (const int*)in[3], (const int*)in[4], (const int*)in[5], (const int*)in[6],
                 n[0], n[1], n[2], n[3], n[4], n[5], n[6], scale);
}
extern "C" void run(int blocks, const void* const* inputs, void* const* outputs, const i64* numbers, float by) {
    std::copy(inputs, inputs + 7, in), std::copy(outputs, outputs + 2, out), std::copy(numbers, numbers + 7, n);
    scale = by;
    for (int warp = 0; warp < blocks * WARPS; warp++) run_warp(warp / WARPS, warp % WARPS * 32, call);
}
"""


def decode(args: dict[str, Any], splits: int, compiled: Compiled) -> torch.Tensor:
    """What the kernel gives, its splits joined as `join_splits_kernel` does."""
    q, cache, table, slopes = (args[name] for name in ("q_TNH", "cache_layer", "block_table_SB", "alibi_slopes_N"))
    (sequences, num_heads, head_size), (num_kv_heads, page) = q.shape, cache.shape[2:4]
    constants = {
        "IS_INT8": cache.dtype == torch.int8, "IS_BF16": q.dtype == torch.bfloat16, "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads, "HEAD_SIZE": head_size, "HEAD_BLOCK": head_size, "PAGE": page,
        "WINDOW": args["window"], "SOFTCAP": args["softcap"], "HAS_SLOPES": slopes is not None, "WARPS": WARPS,
        "MIN_CTAS": 4,
    }  # fmt: skip
    out, partial = torch.full_like(q, 77.0), torch.full((sequences, num_heads, splits, head_size + 2), torch.nan)
    counters = [args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts")]
    inputs = (q, cache, counters[0] if slopes is None else slopes, table, *counters)
    numbers = (*q.stride()[:2], *out.stride()[:2], cache.stride(0), table.stride(0), splits)
    pointers = [(ctypes.c_void_p * len(x))(*(t.data_ptr() for t in x)) for x in (inputs, (out, partial))]
    blocks = -(-sequences * num_kv_heads * splits // WARPS)
    compiled("decode_bytes", constants, CALL).run(
        blocks, *pointers, (ctypes.c_int64 * 7)(*numbers), ctypes.c_float(args["scale"])
    )
    if splits > 1:
        largest, norms = partial[..., head_size], partial[..., head_size + 1]
        share = torch.exp2(largest - largest.amax(-1, keepdim=True))
        sums = torch.where((norms > 0)[..., None], partial[..., :head_size], 0.0) * share[..., None]
        out = (sums.sum(2) / (norms * share).sum(2, keepdim=True)).to(q.dtype)
    return out


def dequantised(rows: torch.Tensor, cache: torch.dtype) -> torch.Tensor:
    if cache == FP8:
        return rows.to(FP8).float()
    integers, scales = quantize_rows(rows)
    return integers * scales


FORMS = [  # heads, dtypes of q and cache, page, splits, and more
    ((8, 2, 128), torch.bfloat16, torch.int8, 16, 1, {}),
    *(
        pytest.param(form, marks=pytest.mark.full)
        for form in (
            ((4, 4, 64), torch.float16, torch.int8, 8, 3, {"window": 40, "softcap": 20.0}),
            ((4, 2, 128), torch.float16, torch.int8, 64, 1, {"window": 40}),
            ((8, 1, 256), torch.bfloat16, torch.int8, 32, 1, {}),
            ((2, 2, 256), torch.float16, torch.int8, 8, 16, {"slopes": torch.tensor([0.1, 0.25])}),
            ((16, 2, 64), torch.bfloat16, torch.int8, 128, 1, {"window": 20}),
            ((8, 2, 128), torch.bfloat16, FP8, 16, 1, {}),
            ((4, 4, 256), torch.float16, FP8, 64, 3, {"softcap": 20.0}),
            ((8, 1, 64), torch.float16, FP8, 8, 1, {"window": 40}),
        )
    ),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_its_error_is_at_most_twice_that_of_low_precision(form: tuple[Any, ...], compiled: Compiled) -> None:
    shape, dtype, cache, page, splits, extra = form
    problem = Problem.draw(list(LENGTHS), *shape, dtype, **extra)
    for part, most in ((problem.k, 0.5), (problem.v, 2.0 if cache == torch.int8 else 0.5)):
        # tokens up to a hundred times larger and smaller than their neighbours
        sizes = [10 ** (torch.rand(len(x), 1, 1) * 2 * most - most) for x in part]
        part[:] = [dequantised(x.float() * size, cache) for x, size in zip(part, sizes, strict=True)]
    args = problem.args([(i, (1, length)) for i, length in enumerate(LENGTHS)], block_size=page)
    kept = args["cache_layer"]
    args["cache_layer"] = quantize_cache(kept) if cache == torch.int8 else kept.to(FP8)
    for i, got in enumerate(decode(args, splits, compiled)):
        exact, low = (problem.dense(i, (1, LENGTHS[i]), arithmetic)[0] for arithmetic in (torch.float64, dtype))
        limit = max((low - exact).norm(), (exact.to(dtype) - exact).norm())
        assert (got - exact).norm() <= 2 * limit, i


def test_what_is_not_a_number_reaches_those_who_see_it_and_nobody_else(compiled: Compiled) -> None:
    problem = Problem.draw([60] * 4, 4, 2, 64, torch.float16, window=40)
    chunks = [(i, (1, 60)) for i in range(4)]

    def answers() -> torch.Tensor:
        args = problem.args(chunks, block_size=16)
        return decode({**args, "cache_layer": quantize_cache(args["cache_layer"])}, 1, compiled)

    clean = answers()
    problem.v[0][19, 0, 3] = float("nan")  # the window hides it
    problem.k[1][30, 0, 5] = float("nan")
    problem.v[2][20, 1, 5] = float("inf")
    problem.q[3][59, 2, 7] = float("nan")
    out = answers()
    is_bad = torch.zeros(4, 4, dtype=torch.bool)
    is_bad[1, :2] = is_bad[2, 2:] = is_bad[3, 2] = True
    assert out[is_bad].isnan().all() and torch.equal(out[~is_bad], clean[~is_bad])
