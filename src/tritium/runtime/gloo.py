"""Ranks on CPUs, connected by torch's gloo: a process group of one engine's own, in nobody's global state."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

from tritium.kernels.communicator import LostRanks

LOOPBACK = "127.0.0.1"
TIMEOUT = timedelta(seconds=120)  # how long a rank waits for the others


class GlooCommunicator:
    """See `kernels.communicator.Communicator`."""

    def __init__(
        self,
        store: distributed.Store,
        rank: int,
        num_ranks: int,
        *,
        address: str = LOOPBACK,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """store: where the ranks find each other, `distributed.FileStore(path, num_ranks)` on one machine. address: at
        which the others reach this one.

        Waits for all ranks. Raises `LostRanks` when they do not come.
        """
        self.rank, self.num_ranks = rank, num_ranks
        options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        try:
            self._group: distributed.ProcessGroupGloo | None = distributed.ProcessGroupGloo(
                store, rank, num_ranks, options
            )
        except RuntimeError as error:
            raise LostRanks(
                f"rank {rank} of {num_ranks} did not find the others: {error}; start all of them"
            ) from error

    def all_gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        """See the protocol."""
        if self._group is None:
            raise LostRanks(f"rank {self.rank} of {self.num_ranks} has let go of the others")
        try:
            self._group.allgather([list(parts)], [x]).wait()  # type: ignore[attr-defined]  # of its base, in C++
        except RuntimeError as error:
            raise LostRanks(f"rank {self.rank} of {self.num_ranks} lost the others: {error}") from error

    def smallest(self, numbers: Sequence[int]) -> list[int]:
        """See the protocol."""
        given = torch.tensor(numbers, dtype=torch.int64)
        parts = torch.empty((self.num_ranks, len(given)), dtype=torch.int64)
        self.all_gather(parts, given)
        return [int(number) for number in parts.min(0).values]

    def close(self) -> None:
        """See the protocol: the group's sockets, port and threads go with it."""
        self._group = None
