"""Ours: `LLM` on an engine that prepare.py has built. A format is a scheme, or the dtype of the weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import side


def cache_bytes(model: Path) -> int:
    """Of a cache in bf16 for `side.CONTEXT` tokens."""
    config = json.loads((model / "config.json").read_text())
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return 2 * numbers * side.CONTEXT


class Ours:
    """As it is by default, but for the size of the cache."""

    def __init__(self, model: Path, form: str, threads: int) -> None:
        import tritium  # noqa: PLC0415 - a part of loading

        self._tritium, self._threads = tritium, threads
        self._llm = tritium.LLM(
            model.parent / f"tritium-{form}",
            num_threads=threads,
            max_model_len=side.MAX_LEN,
            max_num_seqs=32,
            kv_cache_memory=cache_bytes(model),
        )

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        params = self._tritium.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_progress=False)
        return [output.outputs[0].token_ids for output in outputs]

    def logits(self, tokens: list[int]) -> Any:
        from tritium.calibrate.engine_logits import EngineLogits  # noqa: PLC0415 - no part of loading

        return EngineLogits(self._llm.engine, len(tokens), self._threads).logits(tokens).numpy().astype(np.float32)

    def describe(self) -> dict[str, Any]:
        manifest = self._llm.engine.manifest
        weights = sum(record.size for name, record in manifest.files.items() if name.endswith(".safetensors"))
        return {
            "version": self._tritium.__version__,
            "plan_sha256": manifest.files["plan.json"].sha256,
            "weight_file_bytes": weights,
            "prefix_hit_tokens": self._llm.stats.num_prefix_hit_tokens,
        }


if __name__ == "__main__":
    side.run(Ours)
