"""Which part of a model a process computes: ranks and shares as plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """tensor_parallel: processes that share every layer. rank: which of them this is, from 0."""

    tensor_parallel: int = 1
    rank: int = 0

    def share(self, size: int, num_parts: int) -> tuple[int, int] | None:
        """start and stop of this rank's part of `size` elements, cut into `num_parts`; None when they do not divide.

        With fewer parts than ranks, neighbouring ranks have the same part (kv heads of which there are too few).
        """
        if num_parts < 1 or size % num_parts or self.tensor_parallel % num_parts:
            return None
        part, index = size // num_parts, self.rank * num_parts // self.tensor_parallel
        return index * part, (index + 1) * part
