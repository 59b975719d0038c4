"""The peer OpenVINO GenAI, its continuous batching. Precisions of inference and KV cache are its defaults."""

from pathlib import Path
from typing import Any

import numpy as np
import side

BLOCK_TOKENS = 32  # of its cache on CPUs
BATCHED_TOKENS = 512  # its default, 256, was slower


class OpenVino:
    """A format is that of the weights its exporter wrote."""

    def __init__(self, model: Path, form: str, threads: int) -> None:
        import openvino  # noqa: PLC0415 - a part of loading
        import openvino_genai as genai  # noqa: PLC0415

        self._openvino, self._genai, self._path = openvino, genai, model.parent / f"openvino-{form}"
        self._options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        schedule = genai.SchedulerConfig()
        schedule.num_kv_blocks, schedule.max_num_batched_tokens = side.CONTEXT // BLOCK_TOKENS, BATCHED_TOKENS
        schedule.enable_prefix_caching = False
        self._pipeline = genai.ContinuousBatchingPipeline(str(self._path), schedule, "CPU", self._options)

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
        inputs = [self._openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        found = self._pipeline.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in found]

    def logits(self, tokens: list[int]) -> Any:
        core, count = self._openvino.Core(), len(tokens)
        request = core.compile_model(self._path / "openvino_model.xml", "CPU", self._options).create_infer_request()
        given = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, count), dtype=np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        return request.infer(given)["logits"][0].astype(np.float32)

    def describe(self) -> dict[str, Any]:
        size = (self._path / "openvino_model.bin").stat().st_size
        return {"version": self._genai.__version__, "weight_file_bytes": size}


if __name__ == "__main__":
    side.run(OpenVino)
