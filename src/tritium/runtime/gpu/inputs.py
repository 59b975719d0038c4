"""The plan's inputs on a GPU: what the batch builder wrote on the host goes over in one copy a step.

Two pinned staging areas take turns: the host fills one while the copy from the other may still wait for the step before
it. All inputs lie in one piece of memory, block tables last, so that the used part of everything but further groups'
tables is one range.
"""

import time
from collections.abc import Sequence

import torch

from tritium.kernels.gpu.copies import bring

_ALIGNMENT = 64
_NUM_AREAS = 2
_FEW_BYTES = 64 << 10  # which a kernel brings over


class DeviceInputs:
    """Device twins of host tensors, by name, at fixed addresses; `push` brings their used parts over."""

    def __init__(self, host: dict[str, torch.Tensor], device: torch.device, by_token: Sequence[str] = ()) -> None:
        """host: the builder's tensors. Names that begin with `block_table` are by sequence, the others by token.

        by_token: tensors of which `push` may be told how much is used: where they are long, the rest stays behind.
        """
        self._tables = [name for name in host if name.startswith("block_table")]
        self._by_token = tuple(by_token)
        self._flat = [name for name in host if name not in (*self._tables, *by_token)] + list(by_token)
        self._host = {name: tensor.numpy() for name, tensor in host.items()}
        self._offsets: dict[str, int] = {}
        end = 0
        for name in (*self._flat, *self._tables):
            self._offsets[name] = end
            end += _aligned(self._host[name].nbytes)
        self._flat_end = self._offsets[self._tables[0]] if self._tables else end
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self.tensors = {name: self._view(self._device, name, tensor) for name, tensor in host.items()}
        areas = [torch.zeros(end, dtype=torch.uint8).pin_memory() for _ in range(_NUM_AREAS)]
        self._areas = [(area, {n: self._view(area, n, t).numpy() for n, t in host.items()}) for area in areas]
        self._events = [torch.cuda.Event() for _ in range(_NUM_AREAS)]
        self._turn = 0
        self.seconds_waited = 0.0  # for areas whose copy was not over

    def push(self, num_sequences: int, num_tokens: int | None = None) -> None:
        """Copy everything that a step with so many sequences reads, on the current stream, without waiting for it.

        num_tokens: how much of the tensors by token; None: all.
        """
        self._turn = (self._turn + 1) % _NUM_AREAS
        area, arrays = self._areas[self._turn]
        start = time.perf_counter()
        self._events[self._turn].synchronize()
        self.seconds_waited += time.perf_counter() - start
        for name in self._flat:
            used = num_tokens if name in self._by_token else None
            arrays[name][:used] = self._host[name][:used]
        for name in self._tables:
            arrays[name][:num_sequences] = self._host[name][:num_sequences]
        ends = [self._offsets[name] + self._host[name][:num_sequences].nbytes for name in self._tables]
        if num_tokens is None or self._flat_end <= _FEW_BYTES:
            self._copy(area, 0, ends[0] if ends else self._flat_end)
        else:
            start = 0
            for name in self._by_token:  # what is before the first one goes with it
                self._copy(area, start, self._offsets[name] + _aligned(self._host[name][:num_tokens].nbytes))
                start = self._offsets[name] + _aligned(self._host[name].nbytes)
            self._copy(area, start, ends[0] if ends else self._flat_end)
        for name, end in zip(self._tables[1:], ends[1:], strict=True):
            self._copy(area, self._offsets[name], end)
        self._events[self._turn].record()

    def close(self) -> None:
        """Give the memory back: nothing may be pushed after it."""
        self.tensors.clear()
        self._areas.clear()
        del self._device

    def _copy(self, area: torch.Tensor, start: int, end: int) -> None:
        if start == end:
            return
        source, target = area[start:end], self._device[start:end]
        if end - start <= _FEW_BYTES and (end - start) % 8 == 0:
            bring(source.view(torch.int64), target.view(torch.int64))
        else:
            target.copy_(source, non_blocking=True)

    def _view(self, memory: torch.Tensor, name: str, like: torch.Tensor) -> torch.Tensor:
        start = self._offsets[name]
        return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
