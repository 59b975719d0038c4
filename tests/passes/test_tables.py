"""A model is not built for more positions or tokens than its tables have rows."""

import pytest
import torch
from torch import Tensor, nn

from tritium import ops
from tritium.compiler import build
from tritium.errors import ConfigError


class Learned(nn.Module):
    """A decoder with learned positions and a table of tokens."""

    def __init__(self, *, num_positions: int, num_tokens: int, vocab_size: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.wte, self.wpe = nn.Embedding(num_tokens, 8), nn.Embedding(num_positions, 8)
        self.head = nn.Linear(8, vocab_size, bias=False)

    def forward(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        x_TD = self.wte(ids_T) + self.wpe(self.shifted(positions_T))
        heads_TNH = x_TD.view(-1, 2, 4)
        return self.head(x_TD + ops.attention(heads_TNH, heads_TNH, heads_TNH, 0.5).view(-1, 8))

    def shifted(self, positions_T: Tensor) -> Tensor:
        """Sums in more than one spelling."""
        if self.shift == 2:
            return (3 + positions_T) - 1
        return positions_T + self.shift if self.shift else positions_T


def built(path, max_model_len=16, num_positions=16, num_tokens=11, vocab_size=11, shift=0):
    torch.manual_seed(0)
    module = Learned(num_positions=num_positions, num_tokens=num_tokens, vocab_size=vocab_size, shift=shift)
    return build(module, output_dir=path / "engine", max_model_len=max_model_len)


def test_tables_as_long_as_needed_or_longer_are_built(tmp_path):
    assert built(tmp_path).manifest.max_model_len == 16
    assert built(tmp_path, num_tokens=12, num_positions=17).plan.vocab_size == 11


def test_too_few_positions_are_refused_with_the_table_its_rows_the_length_and_the_way_out(tmp_path):
    with pytest.raises(
        ConfigError, match=r"max_model_len is 17, but 'wpe.weight'.* has 16 rows: give max_model_len=16 or less"
    ):
        built(tmp_path, max_model_len=17)
    assert not (tmp_path / "engine").exists()


def test_too_few_tokens_are_refused_with_the_table_its_rows_and_the_number_of_logits(tmp_path):
    with pytest.raises(ConfigError, match=r"logits are for 11 tokens, but 'wte.weight'.* has 10 rows"):
        built(tmp_path, num_tokens=10)


@pytest.mark.parametrize("shift", [1, 2])
def test_a_shift_of_the_positions_takes_rows_away(tmp_path, shift):
    assert built(tmp_path, num_positions=16 + shift, shift=shift).manifest.max_model_len == 16
    expected = rf"'wpe.weight'.* at position \+{shift}, has 16 rows: give max_model_len={16 - shift} or less"
    with pytest.raises(ConfigError, match=expected):
        built(tmp_path, shift=shift)


def test_a_table_shorter_than_the_shift_has_no_length_to_offer(tmp_path):
    with pytest.raises(ConfigError, match=r"at position \+2, has 2 rows: give it a table with more rows"):
        built(tmp_path, num_positions=2, shift=2)


def test_a_shift_below_the_first_row_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'wpe.weight' at position -1, which is no row for the first 1 of them"):
        built(tmp_path, shift=-1)
