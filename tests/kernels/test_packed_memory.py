"""Memory for packed weights."""

import re
from pathlib import Path

import pytest
import torch

from tritium.kernels.cpu.memory import HUGE_PAGE, for_packed


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_inside = int(found[1], 16) <= address < int(found[2], 16)
        elif is_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_large_weights_lie_where_the_system_may_give_huge_pages(dtype):
    data = for_packed(8 * HUGE_PAGE // dtype.itemsize, dtype)
    assert data.shape == (8 * HUGE_PAGE // dtype.itemsize,)
    assert data.dtype == dtype
    assert "hg" in flags_of(data.data_ptr() + HUGE_PAGE)


def test_small_weights_have_the_size_that_was_asked_for_and_can_be_written():
    data = for_packed(1000, torch.float32)
    assert data.fill_(3.0).sum() == 3000.0
