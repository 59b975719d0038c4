"""The peer transformers, as it is by default; one batch of `generate`, without padding. float32 is the reference."""

from pathlib import Path
from typing import Any

import side


class Transformers:
    """A format is a dtype of torch."""

    def __init__(self, model: Path, form: str, threads: int) -> None:
        import torch  # noqa: PLC0415 - a part of loading
        import transformers  # noqa: PLC0415

        torch.set_num_threads(threads)
        self._torch, self._version = torch, transformers.__version__
        self._weights = model / "model.safetensors"
        dtype = getattr(torch, form)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        ids = self._torch.tensor(prompts)
        forced = {"min_new_tokens": length, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
        with self._torch.inference_mode():
            out = self._model.generate(ids, attention_mask=self._torch.ones_like(ids), do_sample=False, **forced)
        return out[:, ids.shape[1] :].tolist()

    def logits(self, tokens: list[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([tokens])).logits[0].float().numpy()

    def describe(self) -> dict[str, Any]:
        return {"version": self._version, "weight_file_bytes": self._weights.stat().st_size}


if __name__ == "__main__":
    side.run(Transformers)
