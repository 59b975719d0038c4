"""Ranks of one model say the same of it, and those of another something else."""

from pathlib import Path

import pytest

from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.runtime.ranks.alike import describe_model, difference, whole_weights
from tritium.testing.tiny_models import make_checkpoint


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen2", "gptj"])  # biases that ranks share, and biases that the first one adds
def test_ranks_of_one_model_say_the_same_of_it_and_others_do_not(name: str, tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / str(seed), name, seed=seed) for seed in (1, 2)]

    def of(seed: int, rank: int, dtype: str) -> Engine:
        path = tmp_path / f"{seed}-{rank}-{dtype}"
        return build(models[seed], output_dir=path, tensor_parallel=2, rank=rank, dtype=dtype)  # type: ignore[arg-type]

    own, same, other, wider = of(0, 0, "bfloat16"), of(0, 1, "bfloat16"), of(1, 1, "bfloat16"), of(0, 1, "float32")
    assert len(whole_weights(own).keys() & whole_weights(same).keys()) >= 3
    assert difference(whole_weights(own), whole_weights(same)) is None
    assert "norm" in str(difference(whole_weights(own), whole_weights(other)))
    assert describe_model(own) == describe_model(same) == describe_model(other) != describe_model(wider)
    assert describe_model(own) == f"{name} in bfloat16, scheme None, bitwise, weights of a checkpoint, generation 0"
