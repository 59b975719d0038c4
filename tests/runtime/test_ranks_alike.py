"""Ranks of one model say the same of it, and those of another something else."""

from pathlib import Path

import pytest

from tritium.compiler import build
from tritium.runtime.ranks.alike import describe_model
from tritium.testing.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    return [make_checkpoint(place / str(seed), "qwen2", seed=seed) for seed in (1, 2)]


@pytest.mark.full
def test_ranks_of_one_model_say_the_same_of_it_and_others_do_not(models: list[Path], tmp_path: Path) -> None:
    def of(model: Path, rank: int, dtype: str) -> str:
        path = tmp_path / f"{model.name}-{rank}-{dtype}"
        return describe_model(build(model, output_dir=path, tensor_parallel=2, rank=rank, dtype=dtype))  # type: ignore[arg-type]

    own = of(models[0], 0, "bfloat16")
    assert own.startswith("qwen2 in bfloat16, scheme None, bitwise, weights ")
    assert of(models[0], 1, "bfloat16") == own
    others = [of(models[1], 1, "bfloat16"), of(models[0], 1, "float32")]
    assert own not in others and others[0].split("weights")[0] == own.split("weights")[0]
