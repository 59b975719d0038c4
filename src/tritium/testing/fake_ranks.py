"""Ranks on GPUs that are made up (`fake_cuda`), connected by what gloo does in NCCL's place.

python -m tritium.testing.fake_ranks FD       is what `tritium.runtime.ranks.process` is, on such a GPU
"""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from tritium.kernels.communicator import Communicator
from tritium.kernels.kernel import resolve
from tritium.runtime.nccl import DTYPES, NcclCommunicator
from tritium.runtime.ranks import process
from tritium.testing.fake_cuda import pretend_to_have_a_gpu

COMMAND = (sys.executable, "-m", "tritium.testing.fake_ranks")
_TYPES = {number: dtype for dtype, number in DTYPES.items()}


class HostLibrary:
    """NCCL's calls, by the communicator of the host."""

    def __init__(self, host: Communicator) -> None:
        self._host = host

    def ncclGetUniqueId(self, unique: Any) -> int:
        """Nobody asks for it."""
        return 0

    def ncclCommInitRank(self, comm: Any, num_ranks: int, unique: Any, rank: int) -> int:
        """The host is connected already."""
        comm._obj.value = 1
        return 0

    def ncclAllReduce(self, x: int, out: int, count: int, dtype: int, *_: Any) -> int:
        """The sum in fp32, in the order of the ranks."""
        kind = _TYPES[dtype]
        parts = torch.empty((self._host.num_ranks, count), dtype=kind)
        self._host.all_gather(parts, _at(x, count, kind))
        _at(out, count, kind).copy_(parts.float().sum(0))
        return 0

    def ncclAllGather(self, x: int, out: int, count: int, dtype: int, *_: Any) -> int:
        """Every rank's numbers."""
        kind, num_ranks = _TYPES[dtype], self._host.num_ranks
        self._host.all_gather(_at(out, num_ranks * count, kind).view(num_ranks, count), _at(x, count, kind))
        return 0

    def ncclCommAbort(self, comm: Any) -> int:
        """Nothing waits."""
        return 0


def pretend_to_have_gpus(patch: Callable[[str, Any], None]) -> None:
    """One for each of two ranks. patch(name, value): as `monkeypatch.setattr`."""
    pretend_to_have_a_gpu(patch)
    patch("torch.cuda.device_count", lambda: 2)
    patch("torch.cuda.set_device", lambda device: None)

    def connect(host: Communicator, device: torch.device) -> NcclCommunicator:
        return NcclCommunicator(host, torch.device("cpu"), HostLibrary(host))

    patch("tritium.runtime.ranks.connect.NcclCommunicator", connect)


def _at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    raw = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype)


def _set(name: str, value: Any) -> None:
    module, _, attribute = name.rpartition(".")
    owner = torch.Tensor if module == "torch.Tensor" else None
    if owner is None:
        owner = resolve(module.replace(".StepGraphs", ":StepGraphs")) if ".StepGraphs" in module else _module(module)
    setattr(owner, attribute, value)


def _module(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    pretend_to_have_gpus(_set)
    process.main()
