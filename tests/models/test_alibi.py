"""ALiBi's slopes against transformers' code."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from tritium.models.alibi import alibi_slopes


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 7, 8, 12, 14, 16, 25, 32, 71, 112])
def test_slopes_are_those_of_transformers(num_heads):
    expected = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), expected, rtol=1e-6, atol=0)
