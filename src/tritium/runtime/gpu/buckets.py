"""Batch sizes that steps are bound for on a GPU: coarser than on a CPU, for each may become a captured graph."""

_STEPS = ((8, 1), (32, 4), (128, 8), (256, 16), (512, 32), (1024, 64), (2048, 128))  # up to a size: multiples of
_LARGEST_STEP = 256


def gpu_bucket(count: int, most: int) -> int:
    """The smallest bucket for `count` rows, but not more than `most` (which is one itself): 1 to 8, 12, 16, ..."""
    count = max(1, count)
    step = next((step for up_to, step in _STEPS if count <= up_to), _LARGEST_STEP)
    return min(most, -(-count // step) * step)
