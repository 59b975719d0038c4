"""What attention's kernels share: scores as exponents, the keys that are seen, a tile of keys and values.

Layout: cache [block, 2, kv head, PAGE, HEAD_SIZE]; in int8 each [PAGE, HEAD_SIZE] is followed by its rows' scales
(ops/kv_int8.py), and a row becomes fp32 when loaded. A cache in e4m3 is computed in f16, which holds its numbers
exactly, with q divided by its largest element: bf16 would take four conversions where f16 takes one.
"""

import triton
import triton.language as tl

from tritium.ops.quantized import SCALE_BYTES

_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """To a few ulps: near 0 by Cephes' polynomial (tanhf), where 1 - 2 / (1 + e^2x) would cancel."""
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (p - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scores_in_base_2(score, scale, SOFTCAP: tl.constexpr):
    """Raw dot products as exponents of 2, soft-capped if asked for."""
    if SOFTCAP > 0.0:
        return _tanh(score * (scale / SOFTCAP)) * (SOFTCAP * LOG2_E)
    return score * (scale * LOG2_E)


@triton.jit
def sequence_of(tile, cu_seqlens_ptr, first, count, NUM_TOKENS: tl.constexpr):
    """The sequence, of those from `first` to `count`, whose tiles of new tokens hold this one; `count` if it has none.

    Sequence i's tiles begin at tokens before it // NUM_TOKENS + sequences before it, so that none shares a tile.
    """
    base = tl.load(cu_seqlens_ptr + first)
    low, high = first, count  # low's tiles begin at or before this one, high's after it
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(cu_seqlens_ptr + middle) - base) // NUM_TOKENS + middle - first <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def key_range(context, split, WINDOW: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """First key that is seen, and where this program's tiles begin and end."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    begin, end = first // TILE * TILE, context
    if SPLITS > 1:
        part = tl.cdiv(tl.cdiv(context - begin, TILE), SPLITS) * TILE
        begin = begin + split * part
        end = tl.minimum(begin + part, context)
    return first, begin, end


@triton.jit
def in_half(q, AXIS: tl.constexpr):
    """q in f16, divided along AXIS by its largest element, which is returned too."""
    q = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), AXIS), 1e-30)
    return (q / tl.expand_dims(largest, AXIS)).to(tl.float16), largest


@triton.jit
def load_tile(
    cache_ptr, table_row_ptr, start, t, is_key, h, d, is_d, stride_block,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, d] from key `start` of kv head h, as the cache holds them; 0 where `is_key` is not."""
    IS_INT8: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
    ROW: tl.constexpr = HEAD_SIZE + _SCALE_BYTES if IS_INT8 else HEAD_SIZE
    if PAGE % TILE == 0:  # a tile lies in one page: one look-up, and offsets in 32 bits
        page = tl.load(table_row_ptr + start // PAGE).to(tl.int64)
        head_ptr = cache_ptr + page * stride_block + h * PAGE * ROW
        offset = start % PAGE + t
    else:
        key = start + t
        page = tl.load(table_row_ptr + key // PAGE, mask=is_key, other=0).to(tl.int64)
        head_ptr = cache_ptr + page * stride_block + h * PAGE * ROW
        offset = key % PAGE
    is_in = is_key[:, None] & is_d[None, :]
    TO_VALUES: tl.constexpr = NUM_KV_HEADS * PAGE * ROW
    place = (head_ptr + offset * HEAD_SIZE)[:, None] + d[None, :]
    k = tl.load(place, mask=is_in, other=0.0)
    v = tl.load(place + TO_VALUES, mask=is_in, other=0.0)
    if IS_INT8:
        scales_ptr = (head_ptr + PAGE * HEAD_SIZE).to(tl.pointer_type(tl.float32)) + offset
        k = k.to(tl.float32) * tl.load(scales_ptr, mask=is_key, other=0.0)[:, None]
        v = v.to(tl.float32) * tl.load(scales_ptr + TO_VALUES // 4, mask=is_key, other=0.0)[:, None]
    return k, v


@triton.jit
def attended(acc, norm, m, q, score, v, PRECISION: tl.constexpr):
    """One tile of keys more into sums acc, norms and maxima m, by its scores; -inf where a row does not see a key."""
    new_m = tl.maximum(m, tl.max(score, 1))
    safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)  # a window may hide a whole tile from a row
    p = tl.exp2(score - safe_m[:, None])
    alpha = tl.exp2(m - safe_m)
    norm = norm * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision=PRECISION)
    return acc, norm, new_m


@triton.jit
def without_nan(v):
    """Values [TILE, d] with zeros for rows that hold an infinity or a NaN, and a number by row: NaN for these, else 0.

    Added to a score it says so to the queries that see the key, where a product with a probability of 0 would to all.
    """
    bad = tl.sum(v.to(tl.float32) * 0.0, 1)
    return tl.where((bad == 0.0)[:, None], v, 0.0), bad
