"""Ours: texts side by side, without padding."""

from pathlib import Path
from typing import Any

import torch

from encoder import side
from tritium import LLM, build


def encoders(model: Path, dtype: str) -> dict[str, side.Encode]:
    """Beside the model stands the engine; one that is there is taken."""
    how = {"dtype": "bfloat16", "scheme": "w8a8"} if dtype == "w8a8" else {"dtype": dtype}
    path = model.parent / f"engine-{dtype}"
    if not path.exists():
        build(model, **how, output_dir=path)
    llm = LLM(path, num_threads=torch.get_num_threads())

    def encode(prompts: list[list[int]]) -> list[Any]:
        found = llm.embed(prompts, pooling="mean", normalize=False, use_progress=False)
        return [output.outputs.embedding for output in found]

    return {"packed": encode}


if __name__ == "__main__":
    side.run(encoders)
