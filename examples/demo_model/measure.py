"""Measure a checkpoint on held-out text and show what it writes.

    python examples/demo_model/measure.py

Prints bits per byte beside `xz -9` on the same bytes, then samples. Run on this directory it reproduces the model card.
"""

import lzma
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
PROMPTS = (
    "def read_json(path):\n    with open(path) as file:\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '"""Count the words in a file."""\n\nimport sys\n',
)
SAMPLERS = {"greedy": {"do_sample": False}, "temperature 0.8": {"do_sample": True, "temperature": 0.8}}
SAMPLE_TOKENS = 120


@torch.inference_mode()
def nats_per_token(model: PreTrainedModel, ids_T: torch.Tensor, context: int) -> float:
    """Mean cross-entropy over all tokens but the first, in windows of `context` tokens that share nothing."""
    total = 0.0
    for start in range(0, len(ids_T) - 1, context):
        window = ids_T[start : start + context + 1]
        logits_TV = model(window[None, :-1], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits_TV, window[1:], reduction="sum").item()
    return total / (len(ids_T) - 1)


def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, context: int | None = None
) -> float:
    """Bits the model needs for each UTF-8 byte of `text`, read as one stream that starts with BOS.

    The stream is cut into windows of `context` tokens (by default all the positions the model has), so a token is
    predicted from half of that on average. Every token is counted once: the first of a window was predicted as the
    last of the window before.
    """
    ids_T = torch.tensor(tokenizer(text, verbose=False).input_ids, device=model.device)
    nats = nats_per_token(model, ids_T, context or model.config.max_position_embeddings)
    return nats * (len(ids_T) - 1) / math.log(2) / len(text.encode())


def xz_bits_per_byte(text: str) -> float:
    """What `xz -9` needs for the same bytes."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(kind, text) for each prompt, greedy and at temperature 0.8 with seed 0."""
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        for kind, options in SAMPLERS.items():
            torch.manual_seed(0)
            output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, **options)
            texts.append((kind, tokenizer.decode(output[0], skip_special_tokens=True)))
    return texts


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    print(f"bits per byte {bits_per_byte(model, tokenizer, text):.4f}, xz -9 {xz_bits_per_byte(text):.4f}")
    for kind, sample in samples(model, tokenizer):
        print(f"--- {kind}\n{sample}")


if __name__ == "__main__":
    main()
