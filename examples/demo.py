"""The demo: builds an engine from the bundled checkpoint (the first time) and completes several prompts at once.

make demo
"""

import asyncio
import time
from pathlib import Path

from tritium import LLM, SamplingParams
from tritium.cli.live import PlainView, make_view
from tritium.errors import TritiumError

MODEL = Path(__file__).parent / "demo_model"
PROMPTS = [
    "import os\nimport sys\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "def read_lines(path):\n    with open(",
    "for name in sorted(",
    "try:\n    value = int(",
    'def __repr__(self):\n    return "',
    "if __name__ == ",
    "from collections import ",
    "    def test_",
    "while True:\n    line = ",
    "class Error(Exception):\n    ",
    "def parse(self, text):\n    ",
]
IN_FLIGHT = 8  # the others wait, and join as soon as one is finished
NUM_THREADS = 1  # for 9 M parameters: two were no faster (2 cores, Zen 4), and far slower beside other programs
SHOWN = 3  # completions printed in full after the live view


async def main() -> None:
    """Open the model, complete all prompts together, say how fast it was."""
    start = time.perf_counter()
    with LLM(MODEL, max_model_len=512, max_num_seqs=IN_FLIGHT, num_threads=NUM_THREADS) as llm:
        print(f"engine {llm.engine.path}, ready after {time.perf_counter() - start:.1f} s", flush=True)
        with make_view(PROMPTS, lambda: llm.stats) as view:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(PROMPTS)):
                    tasks.create_task(complete(llm, index, view))
            seconds = view.rate.seconds
        if type(view) is not PlainView:
            for row in view.rows[:SHOWN]:
                print(f"\n{'-' * 60}\n{row.prompt}{row.text}")
        print(
            f"\n{len(PROMPTS)} requests, {IN_FLIGHT} in flight at once: {view.rate.total:,} tokens in {seconds:.2f} s, "
            f"{view.rate.total / seconds:,.0f} tokens/s"
        )


async def complete(llm: LLM, index: int, view: PlainView) -> None:
    """One request, shown as it grows."""
    params = SamplingParams(max_tokens=160 + 20 * index, min_tokens=128, temperature=0.7, top_p=0.95, seed=index)
    async for delta in llm.generate_async(PROMPTS[index], params):
        view.update(index, delta)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except TritiumError as error:
        raise SystemExit(f"error: {error}") from None
