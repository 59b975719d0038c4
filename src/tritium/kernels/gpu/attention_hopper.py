"""paged_attention for chunks of prompts on Hopper: two kernels in CUDA C++.

gather_keys.cu brings the keys and values of the step's prompts out of the pages into one scratch, in q's type and in
the order that the tensor cores read; prefill.cu multiplies them. An e4m3 number is exact in 16 bits, an int8 one times
its scale is rounded to them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tritium.kernels.gpu import scratch
from tritium.kernels.gpu.cuda import is_hopper, launcher
from tritium.kernels.gpu.tactics import has_hopper_prompts
from tritium.kernels.kernel import LaunchContext

ROWS = 128  # new tokens that a CTA has at a time
_STAGES = 2
_SHORT = 256  # tokens
_WARPS, _BYTES_OF_WARP = 8, 2048  # through which the result goes out
_FP8 = torch.float8_e4m3fn


def tile_of(head_size: int) -> int:
    """Keys a step: what lets queries and two stages fit into 227 KB of shared memory."""
    return 128 if head_size == 128 else 64


def fits(args: Mapping[str, Any], out: torch.Tensor) -> bool:
    """Heads of 128 or 256, no window, no cap, no slopes, 16-byte rows; the cache in q's dtype, in e4m3 or in int8."""
    q, cache = args["q_TNH"], args["cache_layer"]
    is_aligned = all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:2]) for x in (q, out))
    is_aligned = is_aligned and cache.data_ptr() % 16 == 0 and cache.stride(0) * cache.element_size() % 16 == 0
    is_aligned = is_aligned and cache.shape[3] % 4 == 0
    return has_hopper_prompts(args) and is_aligned and is_hopper(q.device)


def bind(args: Mapping[str, Any], out: torch.Tensor, context: LaunchContext) -> Callable[[], bool]:
    """The chunks of ops.paged_attention into out; False, and nothing done, when the scratch cannot hold them.

    Nor short ones where each query head has keys of its own: gathering these takes what the products gain.
    """
    q, cache, table = args["q_TNH"], args["cache_layer"], args["block_table_SB"]
    starts, contexts, counts = (args[name] for name in ("cu_seqlens_q", "context_lens_S", "batch_counts"))
    num_heads, head_size = q.shape[1:]
    num_kv_heads, page = cache.shape[2:4]
    tile = tile_of(head_size)
    is_bf16, is_int8 = q.dtype == torch.bfloat16, cache.dtype == torch.int8
    image_bytes = 2 * tile * head_size  # keys, or values, of a tile and kv head
    most_images = scratch.HOPPER_BYTES // image_bytes
    memory = scratch.take(context, scratch.hopper(), q.device)
    dense, turns = memory[: scratch.HOPPER_BYTES], memory[scratch.HOPPER_BYTES :]
    shape = {"IS_BF16": is_bf16, "HEAD_SIZE": head_size, "TILE": tile}
    gather = launcher(
        "gather_keys",
        {**shape, "KV_HEADS": num_kv_heads, "PAGE": page, "IS_FP8": cache.dtype == _FP8, "IS_INT8": is_int8},
        (cache, dense, table, contexts, counts, turns, cache.stride(0) * cache.element_size(), table.stride(0), 0),
        threads=256,
    )
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1))
    multiply = launcher(
        "prefill",
        {**shape, "NUM_HEADS": num_heads, "GROUP": num_heads // num_kv_heads, "STAGES": _STAGES},
        (q, dense, out, starts, contexts, counts, turns, *strides, float(args["scale"]), 0, 0),
        threads=384,
        shared_bytes=1024 + 2 * ROWS * head_size + 2 * _STAGES * image_bytes + _WARPS * _BYTES_OF_WARP,
    )
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count

    def run() -> bool:
        tiles = -(-context.longest_prefill // tile)
        images = 2 * context.num_prefills * tiles * num_kv_heads
        is_short = context.longest_prefill <= _SHORT and num_heads == num_kv_heads
        if is_short or not 0 < images <= most_images:
            return False
        blocks = context.num_prefill_tokens // ROWS + context.num_prefills
        gather(images, tiles)
        multiply(min(num_sms, blocks * num_heads), tiles, blocks)
        return True

    return run
