"""Batch sizes that steps are bound for: few enough to keep, close enough not to waste rows."""

import math
from collections.abc import Iterable

_EXACT_UP_TO = 64
_FINE_UP_TO, _FINE_STEP = 512, 16
_COARSE_STEP = 64


def bucket(count: int, multiple: int = 1) -> int:
    """The smallest bucket for `count` rows: exact to 64, multiples of 16 to 512, then of 64; always one of `multiple`.

    Never 0. `multiple` is what kernels need for a row's bits not to depend on the number of rows.
    """
    step = 1 if count <= _EXACT_UP_TO else _FINE_STEP if count <= _FINE_UP_TO else _COARSE_STEP
    return _round_up(_round_up(max(1, count), step), multiple)


def common_multiple(multiples: Iterable[int]) -> int:
    """The row count's multiple that suits all kernels of a phase."""
    return math.lcm(1, *multiples)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
