"""Ranks with a GPU each, connected by NCCL: its C API, from the library that torch has loaded.

torch's own process group is not taken: it sums in place, which a plan's values are not made for, and its watchdog ends
the process, here perhaps a user's own. Calls are launched on the current stream and may be part of a CUDA graph; the
first of each kind is made at once, so that NCCL has its memory before the KV cache is given the rest.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tritium.errors import EngineError
from tritium.kernels.communicator import Communicator, LostRanks

LIBRARY = "libnccl.so.2"
ID_BYTES = 128
SUM = 0  # ncclSum
DTYPES = {  # ncclDataType_t
    torch.uint8: 1, torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9,
}  # fmt: skip
_LOCK_SECONDS = 5.0  # that `close` waits for a launch to return


@contextmanager
def nccl_on_loopback() -> Iterator[None]:
    """Inside, NCCL's processes find each other at 127.0.0.1 and not at an address that others can reach, unless
    $NCCL_SOCKET_IFNAME says where. It reads that once, when a process first uses it: it need not stay set."""
    if "NCCL_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        os.environ.pop("NCCL_SOCKET_IFNAME", None)


class UniqueId(ctypes.Structure):
    """ncclUniqueId: passed by value."""

    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


_SIGNATURES: dict[str, list[Any]] = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, UniqueId, ctypes.c_int],
    "ncclAllReduce": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "ncclAllGather": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "ncclCommAbort": [ctypes.c_void_p],
}  # fmt: skip


def load_library(name: str = LIBRARY) -> Any:
    """NCCL with its argument types. Raises `EngineError` where there is none."""
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise EngineError(
            f"ranks on GPUs need NCCL, and {name} cannot be loaded ({error}): install torch with CUDA, which brings it"
        ) from error
    for function, types in _SIGNATURES.items():
        getattr(library, function).argtypes = types
    library.ncclGetErrorString.argtypes = [ctypes.c_int]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


class NcclCommunicator:
    """See `kernels.communicator.GpuCommunicator`. `close` may be called from another thread."""

    def __init__(self, host: Communicator, device: torch.device, library: Any = None) -> None:
        """host: connects the same processes on the CPU. device: this rank's GPU, the current one.

        Waits for all ranks. Raises `EngineError` when NCCL cannot connect them.
        """
        self.rank, self.num_ranks = host.rank, host.num_ranks
        self._host, self._device = host, device
        self._library = library if library is not None else load_library()
        self._lock = threading.Lock()
        self._comm: ctypes.c_void_p | None = None
        unique = UniqueId()
        if self.rank == 0:
            self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(unique)))
        own = torch.frombuffer(bytearray(bytes(unique)), dtype=torch.uint8)
        ids = torch.empty((self.num_ranks, ID_BYTES), dtype=torch.uint8)
        host.all_gather(ids, own)
        unique = UniqueId.from_buffer_copy(ids[0].numpy().tobytes())
        comm = ctypes.c_void_p()
        started = self._library.ncclCommInitRank(ctypes.byref(comm), self.num_ranks, unique, self.rank)
        self._check("ncclCommInitRank", started)
        self._comm = comm
        try:
            self._try_collectives()
        except BaseException:
            self.close()
            raise

    def _try_collectives(self) -> None:
        """The first of each kind."""
        device = self._device
        x = torch.zeros(1, dtype=torch.bfloat16, device=device)
        self.all_reduce(torch.empty_like(x), x)
        self.all_gather(x.new_empty(self.num_ranks), x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """See the protocol."""
        count, dtype = x.numel(), DTYPES[x.dtype]
        with self._lock:
            arguments = (x.data_ptr(), out.data_ptr(), count, dtype, SUM, self._open(), self._stream())
            self._check("ncclAllReduce", self._library.ncclAllReduce(*arguments))

    def all_gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        """See the protocol."""
        count, dtype = x.numel(), DTYPES[x.dtype]
        with self._lock:
            arguments = (x.data_ptr(), parts.data_ptr(), count, dtype, self._open(), self._stream())
            self._check("ncclAllGather", self._library.ncclAllGather(*arguments))

    def smallest(self, numbers: Sequence[int]) -> list[int]:
        """See the protocol."""
        return self._host.smallest(numbers)

    def close(self) -> None:
        """Let go of the others: what waits for one of them on the GPU ends, with any numbers. May be called again."""
        has_lock = self._lock.acquire(timeout=_LOCK_SECONDS)  # a launch may wait for a GPU that waits for ever
        comm, self._comm = self._comm, None
        if has_lock:
            self._lock.release()
        if comm is not None:
            self._library.ncclCommAbort(comm)
        self._host.close()

    def _open(self) -> ctypes.c_void_p:
        if self._comm is None:
            raise LostRanks(f"rank {self.rank} of {self.num_ranks} has let go of the others")
        return self._comm

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    def _check(self, call: str, result: int) -> None:
        if result:
            text = self._library.ncclGetErrorString(result).decode()
            # most often because of another rank, which then has a reason of its own
            raise LostRanks(f"rank {self.rank} of {self.num_ranks}: {call} failed: {text}; NCCL_DEBUG=WARN says more")
