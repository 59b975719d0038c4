"""Ranks that NCCL connects, beside a stand-in for its library that moves the bytes of two threads' memory."""

import ctypes
import os
import threading
from typing import Any

import pytest
import torch

from tritium.errors import EngineError
from tritium.kernels.gpu.collectives import bind_all_reduce
from tritium.kernels.kernel import LaunchContext
from tritium.runtime.nccl import DTYPES, NcclCommunicator, load_library, nccl_on_loopback

CPU = torch.device("cpu")
TYPES = {number: dtype for dtype, number in DTYPES.items()}


def tensor_at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    raw = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype)


class Ranks:
    """Both threads' host communicator and NCCL: what one gives, the other finds."""

    def __init__(self) -> None:
        self.given: dict[int, Any] = {}
        self.barrier = threading.Barrier(2, timeout=20)
        self.aborted: list[int] = []
        self.let_go: list[int] = []

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.given[rank] = value
        self.barrier.wait()
        both = [self.given[r] for r in range(2)]
        self.barrier.wait()
        return both


class Host:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.num_ranks = ranks, rank, 2

    def all_gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        parts.copy_(torch.stack(self.ranks.exchange(self.rank, x)))

    def smallest(self, numbers: list[int]) -> list[int]:
        return [min(pair) for pair in zip(*self.ranks.exchange(self.rank, numbers), strict=True)]

    def close(self) -> None:
        self.ranks.let_go.append(self.rank)


class Library:
    """What NCCL's calls do, for one of the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.fails = ranks, -1, ""

    def ncclGetUniqueId(self, unique: Any) -> int:
        ctypes.memmove(ctypes.addressof(unique._obj), bytes(range(128)), 128)
        return 0

    def ncclCommInitRank(self, comm: Any, num_ranks: int, unique: Any, rank: int) -> int:
        assert bytes(unique) == bytes(range(128)) and num_ranks == 2
        comm._obj.value, self.rank = 100 + rank, rank
        return 0

    def ncclAllReduce(
        self, x: int, out: int, count: int, dtype: int, op: int, comm: ctypes.c_void_p, stream: int
    ) -> int:
        assert (op, comm.value, stream) == (0, 100 + self.rank, 0)
        if self.fails == "ncclAllReduce":
            return 3
        parts = self.ranks.exchange(self.rank, tensor_at(x, count, TYPES[dtype]).clone())
        tensor_at(out, count, TYPES[dtype]).copy_(parts[0] + parts[1])
        return 0

    def ncclAllGather(self, x: int, out: int, count: int, dtype: int, comm: ctypes.c_void_p, stream: int) -> int:
        assert comm.value == 100 + self.rank
        parts = self.ranks.exchange(self.rank, tensor_at(x, count, TYPES[dtype]).clone())
        tensor_at(out, 2 * count, TYPES[dtype]).copy_(torch.cat(parts))
        return 0

    def ncclCommAbort(self, comm: ctypes.c_void_p) -> int:
        self.ranks.aborted.append(comm.value or 0)
        return 0

    def ncclGetErrorString(self, result: int) -> bytes:
        return b"internal error"


def both(do: Any) -> list[Any]:
    """What `do(communicator, library)` returns for each rank, in a thread each."""
    ranks, results = Ranks(), [None, None]

    def run(rank: int) -> None:
        library = Library(ranks)
        results[rank] = do(NcclCommunicator(Host(ranks, rank), CPU, library), library)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_sum_and_what_is_gathered_reach_every_rank() -> None:
    given = [torch.randn(5, 7).to(torch.bfloat16) for _ in range(2)]

    def do(ranks: NcclCommunicator, library: Library) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        total, parts = torch.empty(5, 7, dtype=torch.bfloat16), torch.empty(2, 5, 7, dtype=torch.bfloat16)
        bind_all_reduce({"x": given[ranks.rank]}, [total], LaunchContext(communicator=ranks))()
        ranks.all_gather(parts, given[ranks.rank])
        return total, parts, ranks.smallest([5 + ranks.rank, 9 - ranks.rank])

    for total, parts, smallest in both(do):
        assert torch.equal(total, given[0] + given[1])
        assert torch.equal(parts, torch.stack(given))
        assert smallest == [5, 8]


def test_what_fails_is_said_with_ranks_and_call_and_nothing_runs_after_it_is_closed() -> None:
    def do(ranks: NcclCommunicator, library: Library) -> list[int]:
        library.fails = "ncclAllReduce"
        x = torch.ones(1)
        with pytest.raises(EngineError, match=rf"rank {ranks.rank} of 2: ncclAllReduce failed: internal error; NCCL_D"):
            ranks.all_reduce(x, x)
        ranks.close()
        ranks.close()
        assert ranks.rank in library.ranks.let_go
        with pytest.raises(EngineError, match=rf"rank {ranks.rank} of 2 has let go of the others"):
            ranks.all_gather(torch.ones(2, 1), x)
        return library.ranks.aborted

    assert sorted(both(do)[0]) == [100, 101]


def test_a_communicator_whose_first_collective_fails_is_let_go() -> None:
    ranks = Ranks()
    ranks.exchange = lambda rank, value: [value, value]  # type: ignore[method-assign]
    library = Library(ranks)
    library.fails = "ncclAllReduce"
    with pytest.raises(EngineError, match="rank 0 of 2: ncclAllReduce failed"):
        NcclCommunicator(Host(ranks, 0), CPU, library)
    assert ranks.aborted == [100]


def test_the_interface_of_nccl_is_said_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with nccl_on_loopback():
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    with nccl_on_loopback():
        assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


def test_a_machine_without_nccl_is_told_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"need NCCL, and libnothere.so cannot be loaded .*: install torch with CUDA"):
        load_library("libnothere.so")
