"""Tests of the GPU kernels, `pytest -m gpu tests/gpu`: in real dtypes on a GPU, else by Triton's interpreter.

The interpreter is right for fp32, fp16 and int8, and silently wrong for bf16 and fp8: those run on a GPU only.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when kernels are defined


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
