"""CUDA sources: found, given their constants, and only used where a GPU can run them."""

import pytest
import torch

from tritium.kernels.gpu import cuda


@pytest.mark.parametrize("name", ["decode_bytes", "linear_fp8"])
def test_a_source_begins_with_its_constants_and_has_what_sources_share(name: str) -> None:
    text = cuda.source_of(name, {"IS_BF16": True, "SOFTCAP": 30.0, "WINDOW": 4096})
    assert text.startswith("#define IS_BF16 1\n#define SOFTCAP 30.0f\n#define WINDOW 4096\n")
    assert "mma.sync" in text and f"{name}(" in text and text.count("{") == text.count("}")


def test_without_a_gpu_nothing_is_compiled() -> None:
    assert not cuda.can_compile(torch.device("cpu")) and not cuda.can_convert_fp8(torch.device("cpu"))
