"""The KV cache: one storage, blocks of equal size, shared by every KV group.

    storage  uint8  [num_blocks, block_bytes]
    layer i of a group, seen through it: [num_blocks, 2, K, block_size, H], strided in dimension 0

A block holds `block_size` tokens of all layers of one group. Block 0 is the null block: nothing is ever stored there.
"""

import math
from collections.abc import Sequence

import torch

from tritium.engine.plan import KVGroup
from tritium.errors import EngineError, OutOfMemory


def layer_block_bytes(group: KVGroup, block_size: int) -> int:
    """Bytes of one layer's keys and values in one block."""
    itemsize = getattr(torch, group.dtype).itemsize
    return 2 * group.num_kv_heads * block_size * group.head_size * itemsize


def block_bytes(groups: Sequence[KVGroup], block_size: int) -> int:
    """Bytes of one block: the largest any group needs, in whole cache lines."""
    most = max((len(g.layers) * layer_block_bytes(g, block_size) for g in groups), default=0)
    return math.ceil(most / 64) * 64


class KVCache:
    """Owns the storage; `layer(i)` is what the kernels of attention layer i read and write.

    The storage is not cleared and its pages are not touched here: memory is used as blocks are.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_blocks: int, block_size: int, device: torch.device | None = None
    ) -> None:
        """device: None is the CPU. Raises `OutOfMemory` when the system refuses even the addresses."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        size = block_bytes(groups, block_size)
        try:
            self.storage = torch.empty((num_blocks, size), dtype=torch.uint8, device=device)
        except RuntimeError as error:
            total = num_blocks * size
            raise OutOfMemory(
                f"{device or 'the system'} refuses {total:,} bytes for the KV cache; give kv_cache_memory"
            ) from error
        self._layers = {
            layer: _layer_view(self.storage, group, index, block_size)
            for group in groups
            for index, layer in enumerate(group.layers)
        }

    def fill(self) -> None:
        """Write small numbers everywhere (0.01 in bf16 and fp32, 1.06 in fp16), for timing: pages never written to are
        all one page, which is always in the cache."""
        self.storage.fill_(0x3C)

    def layer(self, layer: int) -> torch.Tensor:
        """[num_blocks, 2, K, block_size, H]; `EngineError` when the plan has no such attention layer."""
        if layer not in self._layers:
            raise EngineError(f"no KV group has attention layer {layer}: the plan is damaged; build the engine again")
        return self._layers[layer]


def _layer_view(storage: torch.Tensor, group: KVGroup, index: int, block_size: int) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, group.dtype)
    shape = (storage.shape[0], 2, group.num_kv_heads, block_size, group.head_size)
    inner = (group.num_kv_heads * block_size * group.head_size, block_size * group.head_size, group.head_size, 1)
    stride = (storage.shape[1] // dtype.itemsize, *inner)
    offset = index * layer_block_bytes(group, block_size) // dtype.itemsize
    return storage.view(dtype).as_strided(shape, stride, offset)
