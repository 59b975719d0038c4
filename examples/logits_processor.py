"""Logits processors of one's own: one that keeps a list of digits going, one that forbids a letter.

python examples/logits_processor.py
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tritium import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model"


class OnlyThese:
    """Lets a request choose tokens made of certain characters alone. One object may serve many requests."""

    def __init__(self, llm: LLM, characters: str) -> None:
        tokens = (llm.tokenizer.decode([token_id]) for token_id in range(llm.engine.plan.vocab_size))
        self.is_forbidden = np.array([not text or not set(text) <= set(characters) for text in tokens])

    def __call__(self, prompt: Sequence[int], outputs: Sequence[int], logits: np.ndarray) -> None:
        """Changes the row in place."""
        logits[self.is_forbidden] = -np.inf


class Without:
    """Forbids tokens that hold a letter, once a request has made ten tokens."""

    def __init__(self, llm: LLM, letter: str) -> None:
        tokens = (llm.tokenizer.decode([token_id]) for token_id in range(llm.engine.plan.vocab_size))
        self.is_forbidden = np.array([letter in text for text in tokens])

    def __call__(self, prompt: Sequence[int], outputs: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """Returns another row."""
        return np.where(self.is_forbidden, -np.inf, logits) if len(outputs) >= 10 else logits


def main() -> None:
    """Two requests, in flight together, each with its own processor; a third without any."""
    with LLM(MODEL, max_model_len=256, num_threads=1) as llm:
        common = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
        params = [
            SamplingParams(logits_processors=OnlyThese(llm, "0123456789, "), **common),
            SamplingParams(logits_processors=Without(llm, "e"), **common),
            SamplingParams(**common),
        ]
        for output in llm.generate(["PRIMES = (2, 3, 5, 7, "] + ["def read_lines(path):\n"] * 2, params):
            print("---", repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
