"""Offline batch: many prompts at once, two samples of each, the likelier one printed.

python examples/offline_batch.py
"""

from pathlib import Path

from tritium import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model"
PROMPTS = [
    "def main(",
    "import os\nimport ",
    "class Stack:\n    def __init__(self",
    "for name in sorted(",
    "try:\n    value = int(",
    "with open(path) as ",
]


def main() -> None:
    """All prompts are in flight together; the outputs come back in the order of the prompts."""
    params = SamplingParams(
        n=2, temperature=0.8, top_p=0.95, seed=1, max_tokens=32, logprobs=0, stop=["\n\n"], frequency_penalty=0.2
    )
    with LLM(MODEL, max_model_len=256, num_threads=1) as llm:
        outputs = llm.generate(PROMPTS, params)
    for output in outputs:
        best = max(output.outputs, key=lambda completion: completion.cumulative_logprob)
        mean = best.cumulative_logprob / len(best.token_ids)
        print(f"{mean:6.2f} per token, ended by {best.finish_reason}: {output.prompt + best.text!r}")


if __name__ == "__main__":
    main()
