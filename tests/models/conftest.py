"""Tiny models on one thread: on busy cores a second one only spins (measured: 145 s of CPU time against 34 s)."""

from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Generator[None]:
    """Let torch use one thread for the tests of this directory."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
