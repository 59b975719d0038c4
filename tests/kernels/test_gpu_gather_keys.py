"""csrc/gather_keys.cu without a GPU: compiled as C++, thread by thread, against the images that tensor cores read."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tritium.ops.kv_int8 import quantize_cache
from tritium.ops.quantized import quantize_rows
from tritium.testing.attention_problems import Problem

CHUNKS = [(0, (1, 20)), (1, (5, 70)), (2, (100, 130))]  # the single token is another kernel's
CALL = """
extern "C" void run(int blocks, const void* const* in, uint4* dense, int* turns, i64 block, i64 row, i64 tiles) {
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++)
            gather_keys((const u8*)in[0], dense, (const int*)in[1], (const int*)in[2], (const int*)in[3], turns, block,
                        row, tiles);
}
"""


def image(x_SKH: torch.Tensor, tile: int) -> torch.Tensor:
    """Keys of one prompt, [tile, K, HEAD_SIZE / 64, TILE, 64]: pieces of eight numbers stand at piece ^ (key % 8)."""
    num_tiles = -(-len(x_SKH) // tile)
    whole = torch.zeros(num_tiles * tile, *x_SKH.shape[1:], dtype=x_SKH.dtype)
    whole[: len(x_SKH)] = x_SKH
    pieces = whole.unflatten(2, (-1, 8, 8)).unflatten(0, (num_tiles, tile)).permute(0, 2, 3, 1, 4, 5)
    key, place = torch.arange(tile)[:, None], torch.arange(8)
    return pieces[..., key, place ^ key % 8, :].flatten(-2)


@pytest.mark.parametrize(
    ("dtype", "kept", "page", "head_size", "tile"),
    [(torch.bfloat16, torch.int8, 16, 128, 128), (torch.float16, torch.float16, 64, 256, 64)],
    ids=str,
)
def test_prompts_keys_become_the_images_that_products_read(
    dtype: torch.dtype, kept: torch.dtype, page: int, head_size: int, tile: int,
    compiled: Callable[[str, dict[str, Any], str], ctypes.CDLL],
) -> None:  # fmt: skip
    problem = Problem.draw([context for _, (_, context) in CHUNKS], 4, 2, head_size, dtype)
    args = problem.args(CHUNKS, block_size=page)
    cache = quantize_cache(args["cache_layer"]) if kept == torch.int8 else args["cache_layer"]
    parts = [problem.k, problem.v]
    if kept == torch.int8:
        parts = [[(n * scale).to(dtype) for n, scale in map(quantize_rows, part)] for part in parts]
    tiles = -(-max(context for _, (_, context) in CHUNKS) // tile)
    dense = torch.full((2, tiles, 2, 2, head_size // 64, tile, 64), 77.0, dtype=dtype)
    constants = {"IS_BF16": dtype == torch.bfloat16, "KV_HEADS": 2, "HEAD_SIZE": head_size, "PAGE": page, "TILE": tile}
    tensors = (cache, args["block_table_SB"], args["context_lens_S"], args["batch_counts"])
    turns = torch.full((1,), 5, dtype=torch.int32)
    compiled("gather_keys", {**constants, "IS_FP8": False, "IS_INT8": kept == torch.int8}, CALL).run(
        dense[:, :, 0, 0, 0, 0, 0].numel() * 4,
        (ctypes.c_void_p * 4)(*(x.data_ptr() for x in tensors)), ctypes.c_void_p(dense.data_ptr()),
        ctypes.c_void_p(turns.data_ptr()), ctypes.c_int64(cache.stride(0) * cache.element_size()),
        ctypes.c_int64(args["block_table_SB"].stride(0)), ctypes.c_int64(tiles),
    )  # fmt: skip
    assert turns.item() == 0
    for prompt, (sequence, _) in enumerate(CHUNKS[1:]):
        for part, keys in enumerate(parts):
            wanted = image(keys[sequence], tile)
            assert torch.equal(dense[prompt, : len(wanted), :, part], wanted)
            assert (dense[prompt, len(wanted) :, :, part] == 77).all()
