"""What the tuner may choose among for GPU kernels: rows' tactics. The empty one, first, is what sizes alone decide.

Needs no triton: engines for a GPU can be built, and their sites listed, where there is none. A tactic may want more
shared memory than a GPU has; the tuner finds that out and leaves it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tritium.kernels.kernel import Tactic

FP8 = torch.float8_e4m3fn


def _tiles(names: tuple[str, ...], *rows: tuple[int, ...]) -> tuple[Tactic, ...]:
    tactics: list[Tactic] = [dict(zip(names, row, strict=True)) for row in rows]
    return ({}, *tactics)


# Outputs and rows of a tile, programs that share its inputs (few rows only).
QUANTIZED = _tiles(
    ("BLOCK_N", "BLOCK_M", "SPLITS", "num_warps", "num_stages"),
    (64, 16, 4, 4, 4),
    (64, 16, 8, 4, 6),
    (64, 32, 4, 4, 4),
    (64, 64, 2, 4, 3),
    (64, 64, 1, 4, 3),
    (128, 64, 1, 4, 3),
    (64, 128, 1, 4, 3),
    (128, 128, 1, 8, 3),
)
# Rows, outputs and inputs of a tile: sums of int8 products are exact, so that every tile has the same bits.
INT8 = _tiles(
    ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"),
    (16, 32, 256, 4, 4),
    (16, 64, 128, 4, 6),
    (64, 64, 256, 4, 3),
    (64, 64, 128, 4, 4),
    (128, 64, 128, 4, 4),
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
)
# blocks: of decode attention over fp8 or int8 an SM holds at once. split_below: programs; a batch of fewer has its
# contexts read in parts. prompts: "triton" in place of Hopper's own kernel.
PAGED_ATTENTION: tuple[Tactic, ...] = (
    {},
    {"blocks": 4},
    {"blocks": 6},
    {"split_below": 0},
    {"split_below": 132},
    {"split_below": 528},
    {"prompts": "triton"},
)
# Whose GEMM: cuBLAS's, or Triton's, in place of what sizes decide.
LINEAR: tuple[Tactic, ...] = ({}, {"by": "triton"})
LINEAR_FP8: tuple[Tactic, ...] = ({}, {"by": "triton"}, {"by": "cublas"})
# "own" in place of FlashInfer's kernel, where that is slower.
FLASHINFER: tuple[Tactic, ...] = ({}, {"single_tokens": "own"})


def fits_paged_attention(args: Mapping[str, Any], tactic: Mapping[str, Any]) -> str | None:
    """blocks: of the kernel for caches of a byte a number; prompts: where Hopper's kernel may run."""
    q, cache = args["q_TNH"], args["cache_layer"]
    num_heads, head_size = q.shape[1:]
    is_16_bits = q.dtype in (torch.bfloat16, torch.float16)
    if "blocks" in tactic:
        is_known = cache.dtype in (FP8, torch.int8) and is_16_bits and head_size in (64, 128, 256)
        return None if is_known and num_heads // cache.shape[2] <= 8 else "another kernel reads this cache"
    if "prompts" in tactic and not has_hopper_prompts(args):
        return "Triton's kernel runs these prompts in any case"
    return None


def has_hopper_prompts(args: Mapping[str, Any]) -> bool:
    """On Hopper attention_hopper.py computes the prompts, if tensors are aligned as it wants."""
    q, cache = args["q_TNH"], args["cache_layer"]
    is_plain = not args["window"] and not args["softcap"] and args.get("alibi_slopes_N") is None
    is_known = q.dtype in (torch.bfloat16, torch.float16) and cache.dtype in (q.dtype, FP8, torch.int8)
    return is_plain and is_known and q.shape[2] in (128, 256)
