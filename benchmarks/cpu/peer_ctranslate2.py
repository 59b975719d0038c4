"""The peer CTranslate2, int8 weights and activations (its `int8`); a batch goes through as one."""

from pathlib import Path
from typing import Any

import numpy as np
import side


class CTranslate2:
    """A format is its compute type."""

    def __init__(self, model: Path, form: str, threads: int) -> None:
        import ctranslate2  # noqa: PLC0415 - a part of loading

        self._ctranslate2, self._path = ctranslate2, model.parent / f"ctranslate2-{form}"
        self._generator = ctranslate2.Generator(
            str(self._path), device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
        )
        self._names = [f"w{i}" for i in range(side.VOCAB_SIZE)]

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        found = self._generator.generate_batch(
            [[self._names[i] for i in ids] for ids in prompts],
            max_length=length,
            min_length=length,
            include_prompt_in_result=False,
            sampling_topk=1,
        )
        return [result.sequences_ids[0] for result in found]

    def logits(self, tokens: list[int]) -> Any:
        found = self._generator.forward_batch([[self._names[i] for i in tokens]], return_log_probs=False)
        return np.array(found)[0].astype(np.float32)

    def describe(self) -> dict[str, Any]:
        size = (self._path / "model.bin").stat().st_size
        return {"version": self._ctranslate2.__version__, "weight_file_bytes": size}


if __name__ == "__main__":
    side.run(CTranslate2)
