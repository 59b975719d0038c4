"""What this machine can do at most, measured in this process: bytes read per second, and operations per second."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_BYTES = 256 << 20  # far more than any cache
_SIZE = 2048  # of the square product
_ROUNDS = 4


class Ceilings(NamedTuple):
    """bytes_per_second: reading memory once. flops_per_second: a matrix product in the engine's dtype."""

    bytes_per_second: float
    flops_per_second: float


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """About a second. The best of a few rounds: a ceiling is what can be reached."""
    data = torch.ones(_BYTES // 4, dtype=torch.float32)
    a, b = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    return Ceilings(_BYTES / _best(data.sum), 2 * _SIZE**3 / _best(lambda: a @ b))


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
