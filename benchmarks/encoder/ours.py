"""Ours: texts side by side, without padding."""

from pathlib import Path
from typing import Any

import torch

from encoder import side
from tritium import LLM, build


def encoders(model: Path, dtype: str) -> dict[str, side.Encode]:
    """Beside the model stands the engine."""
    how = {"dtype": "bfloat16", "scheme": "w8a8"} if dtype == "w8a8" else {"dtype": dtype}
    engine = build(model, **how, output_dir=model.parent / f"engine-{dtype}")
    llm = LLM(engine.path, num_threads=torch.get_num_threads())

    def encode(prompts: list[list[int]]) -> list[Any]:
        found = llm.embed(prompts, pooling="mean", normalize=False, use_progress=False)
        return [output.outputs.embedding for output in found]

    return {"packed": encode}


if __name__ == "__main__":
    side.run(encoders)
