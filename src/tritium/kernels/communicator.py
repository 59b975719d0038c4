"""What collectives need of whoever connects the ranks. One is passed in a kernel's launch context; none is global."""

from collections.abc import Sequence
from typing import Protocol

import torch

from tritium.errors import EngineError


class LostRanks(EngineError):
    """Another rank is gone, which has a reason of its own."""


class Communicator(Protocol):
    """Connects the ranks of one engine. Calls belong on one thread and are made in the same order by every rank.

    Each raises `LostRanks` when a rank is gone.
    """

    @property
    def rank(self) -> int:
        """Which of the ranks this process is."""
        ...

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        ...

    def all_gather(self, parts: torch.Tensor, x: torch.Tensor) -> None:
        """Write rank r's x into parts[r]. Dense, of one dtype, on the ranks' device, parts [num_ranks, *x.shape].

        On CPUs it returns when all have; on GPUs it is launched on the current stream.
        """
        ...

    def smallest(self, numbers: Sequence[int]) -> list[int]:
        """Of each number the smallest that any rank gives. Waits for all of them."""
        ...

    def close(self) -> None:
        """Let go of the others, and of what connects them. May be called again; nothing else is, after it."""
        ...


class GpuCommunicator(Communicator, Protocol):
    """Connects ranks that have a GPU each."""

    def all_reduce(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Launch: the sum of every rank's x into out, in an order that may differ from element to element. Every rank
        gets the same bits. Dense, of one shape and dtype."""
        ...
