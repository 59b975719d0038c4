"""Classification: probabilities of labels for texts, and scores of a query with documents from a cross-encoder.

python examples/classification.py [MODEL]    a directory or hub id; without one, a small untrained classifier is made
"""

import sys
import tempfile
from pathlib import Path

from tritium import LLM, build
from tritium.models import EncoderConfig

TEXTS = ["What a wonderful day!", "This is the worst film of the year.", "The train leaves at nine."]
SMALL = EncoderConfig(
    architecture="BertForSequenceClassification",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_positions=128,
    num_token_types=2,
    head="sequence",
    labels=("negative", "neutral", "positive"),
)


def untrained(folder: str) -> Path:
    """An engine without a tokenizer: it takes token ids."""
    return build(SMALL, weights="dummy", output_dir=Path(folder) / "engine").path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LLM(sys.argv[1] if sys.argv[1:] else untrained(folder)) as llm:
        prompts = TEXTS if llm.tokenizer is not None else [list(text.encode()) for text in TEXTS]
        for text, output in zip(TEXTS, llm.classify(prompts), strict=True):
            probs = dict(zip(output.outputs.labels, output.outputs.probs, strict=True))
            best = max(probs, key=lambda label: probs[label])
            print(f"{best} ({probs[best]:.2f}): {text}")
        if llm.tokenizer is not None and len(output.outputs.labels) == 1:  # a cross-encoder
            for scored, text in zip(llm.score("How was the film?", TEXTS), TEXTS, strict=True):
                print(f"{scored.outputs.score:.3f}  {text}")


if __name__ == "__main__":
    main()
