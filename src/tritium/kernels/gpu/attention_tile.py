"""What the kernels of paged_attention share: scores as exponents, the keys that are seen, a tile of keys and values.

Layout: cache [block, 2, kv head, PAGE, HEAD_SIZE]. A cache in e4m3 is computed in f16, which holds its numbers exactly,
with q divided by its largest element: bf16 would take four conversions where f16 takes one.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_in_base_2(score, scale, SOFTCAP: tl.constexpr):
    """Raw dot products as exponents of 2, soft-capped if asked for."""
    if SOFTCAP > 0.0:
        x = score * (scale / SOFTCAP)
        return (2.0 * tl.sigmoid(2.0 * x) - 1.0) * (SOFTCAP * LOG2_E)
    return score * (scale * LOG2_E)


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
    if PAGE % TILE == 0:  # a tile lies in one page: one look-up, and offsets in 32 bits
        page = tl.load(table_row_ptr + start // PAGE).to(tl.int64)
        tile_ptr = cache_ptr + page * stride_block + (h * PAGE + start % PAGE) * HEAD_SIZE
        place = tile_ptr + (t * HEAD_SIZE)[:, None] + d[None, :]
    else:
        key = start + t
        page = tl.load(table_row_ptr + key // PAGE, mask=is_key, other=0).to(tl.int64)
        place = cache_ptr + (page * stride_block + (h * PAGE + key % PAGE) * HEAD_SIZE)[:, None] + d[None, :]
    is_in = is_key[:, None] & is_d[None, :]
    k = tl.load(place, mask=is_in, other=0.0)
    return k, tl.load(place + NUM_KV_HEADS * PAGE * HEAD_SIZE, mask=is_in, other=0.0)
