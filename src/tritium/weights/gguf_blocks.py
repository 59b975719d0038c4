"""GGUF's block formats: the bytes of a tensor as numbers. Layouts after ggml's specification (ggml-common.h).

A row is a sequence of blocks of as many elements; f16 numbers are little endian.

Q8_0  32 elements: d f16, q int8 [32];                          d * q
Q4_0  32 elements: d f16, 16 bytes: element i low, i + 16 high;  d * (q - 8)
Q4_K  256: d, dmin f16; eight 6-bit scales and minima in 12 bytes; 128 bytes, 32 of which hold two runs of 32 elements:
      low nibbles, then high ones;                               (d * scale) * q - dmin * minimum
Q6_K  256: low four bits in 128 bytes, high two in 64; 16 int8 scales; d f16;   (d * scale) * (q - 32)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class BlockType(NamedTuple):
    """num_elements, num_bytes: of a block. decode: uint8 [blocks, num_bytes] to fp32 [blocks, num_elements]."""

    name: str
    num_elements: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor]
    dtype: str | None = None  # of a type that torch has


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def q4_0_numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [blocks, 32] and the scales, float16 [blocks, 1]."""
    data = blocks[:, 2:]
    return torch.cat((data & 15, data >> 4), 1).to(torch.int8) - 8, blocks[:, :2].contiguous().view(torch.float16)


def _q4_0(blocks: Tensor) -> Tensor:
    numbers, scales = q4_0_numbers(blocks)
    return scales.float() * numbers.float()


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1).float()
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1).float()
    data = blocks[:, 16:].unflatten(1, (4, 32))
    numbers = torch.stack((data & 15, data >> 4), 2).flatten(1, 2).float()  # [blocks, 8, 32]
    steps, offsets = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (steps[..., None] * numbers - offsets[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].unflatten(1, (2, 2, 32))  # halves of 128 elements; in each, two times 32 bytes
    high = blocks[:, 128:192].unflatten(1, (2, 32))
    scales, d = blocks[:, 192:208].view(torch.int8).float(), _half(blocks, 208)
    parts = [low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
    parts = [part | (((high >> (2 * i)) & 3) << 4) for i, part in enumerate(parts)]
    numbers = (torch.stack(parts, 2).flatten(1).to(torch.int8) - 32).float()
    return (d * scales).repeat_interleave(16, 1) * numbers


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _as(torch.float32), "float32"),
    1: BlockType("F16", 1, 2, _as(torch.float16), "float16"),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType("BF16", 1, 2, _as(torch.bfloat16), "bfloat16"),
}
