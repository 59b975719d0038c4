"""What collectives need of whoever connects the ranks. One is passed in a kernel's launch context; none is global."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Communicator(Protocol):
    """Connects the ranks of one engine. Calls belong on one thread and are made in the same order by every rank."""

    @property
    def rank(self) -> int:
        """Which of the ranks this process is."""
        ...

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        ...

    def all_gather(self, parts: Sequence[torch.Tensor], x: torch.Tensor) -> None:
        """Write rank r's x into parts[r]; dense tensors of one shape and dtype on the CPU. Returns when all have.

        Raises `EngineError` when a rank is gone.
        """
        ...
