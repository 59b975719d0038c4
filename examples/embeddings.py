"""Embeddings: an encoder in the sentence-transformers layout, and the nearest of some sentences to a question.

python examples/embeddings.py [MODEL]    a directory or hub id; without one, a small untrained encoder is made
"""

import sys
import tempfile
from pathlib import Path

from tritium import LLM, build
from tritium.models import EncoderConfig

SENTENCES = ["The cat sleeps on the sofa.", "A dog barks at the postman.", "Interest rates rose again in March."]
QUESTION = "Which animal is resting?"
SMALL = EncoderConfig(
    architecture="BertModel",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_positions=128,
    num_token_types=2,
)


def untrained(folder: str) -> Path:
    """An engine without a tokenizer: it takes token ids."""
    return build(SMALL, weights="dummy", output_dir=Path(folder) / "engine").path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LLM(sys.argv[1] if sys.argv[1:] else untrained(folder)) as llm:
        texts = [*SENTENCES, QUESTION]
        prompts = texts if llm.tokenizer is not None else [list(text.encode()) for text in texts]  # bytes are tokens
        outputs = llm.embed(prompts, truncate_prompt_tokens=-1)
        *sentences, question = [output.outputs.embedding for output in outputs]
        scores = [sum(a * b for a, b in zip(question, sentence, strict=True)) for sentence in sentences]
        for score, text in sorted(zip(scores, SENTENCES, strict=True), reverse=True):
            print(f"{score:6.3f}  {text}")


if __name__ == "__main__":
    main()
