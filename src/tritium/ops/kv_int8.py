"""How a KV cache in int8 lies: each kv head's part of a block is its rows' integers, then their scales in fp32.

So rows begin where vectors can be loaded, and scales of neighbouring tokens lie side by side. A row has SCALE_BYTES
more elements than its head, though these are not behind it.
"""

import torch

from tritium.ops.quantized import SCALE_BYTES, quantize_rows


def parts_of(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache [..., block_size, H + SCALE_BYTES]: integers [..., block_size, H], scales' bytes [..., 4]."""
    block_size, row = cache.shape[-2:]
    head_size = row - SCALE_BYTES
    both = cache.flatten(-2)
    integers = both[..., : block_size * head_size].unflatten(-1, (block_size, head_size))
    return integers, both[..., block_size * head_size :].unflatten(-1, (block_size, SCALE_BYTES))


def quantize_cache(cache: torch.Tensor) -> torch.Tensor:
    """A whole cache [..., block_size, H] in int8: [..., block_size, H + SCALE_BYTES], each row by `quantize_rows`."""
    *sizes, head_size = cache.shape
    out = torch.empty(*sizes, head_size + SCALE_BYTES, dtype=torch.int8, device=cache.device)
    integers, scale_bytes = parts_of(out)
    integers[:], scales = quantize_rows(cache)
    scale_bytes[:] = scales.contiguous().view(torch.int8)
    return out
