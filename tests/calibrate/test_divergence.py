"""How far two engines' outputs are apart: the number is the formula's, and what is no number is never near."""

import math

import pytest
import torch

from tritium.calibrate.divergence import Outputs
from tritium.compiler import build
from tritium.testing.tiny_encoders import make_encoder

WINDOW = (3, 1, 4, 1, 5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoder")
    path, _ = make_encoder(place / "model", "BertForSequenceClassification")
    return build(path, output_dir=place / "engine")


def outputs(encoder, *rows):
    made = Outputs(encoder, WINDOW)
    made.rows = list(rows)
    return made


def test_an_encoder_is_at_no_distance_from_itself(encoder):
    assert Outputs(encoder, WINDOW).divergence(Outputs(encoder, WINDOW)) == 0.0


def test_an_encoders_distance_is_the_squared_relative_error_of_the_worst_row(encoder):
    first = outputs(encoder, torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0]))
    second = outputs(encoder, torch.tensor([[3.0, 4.5], [0.0, 2.0]]), torch.tensor([1.2]))
    assert first.divergence(second) == pytest.approx(0.04, rel=1e-6)  # the score: 0.2 of 1; the first row: 0.5 of 5


def test_a_nan_in_any_output_is_beyond_every_bound(encoder):
    first = outputs(encoder, torch.ones(2, 3), torch.ones(3))
    second = outputs(encoder, torch.ones(2, 3), torch.tensor([1.0, math.nan, 1.0]))
    assert math.isnan(first.divergence(second))
