"""Streaming: two prompts answered at once, each piece of text as it is made; the second is left early.

python examples/streaming.py
"""

import asyncio
from pathlib import Path

from tritium import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model"


async def follow(llm: LLM, prompt: str, most_pieces: int) -> str:
    """The text of the first pieces. Leaving the loop aborts the request and frees what it held."""
    text = prompt
    count = 0
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    async for output in llm.generate_async(prompt, params):
        piece = output.outputs[0].text  # what is new; whole characters only
        print(f"[{prompt[:9]!r}] {piece!r}")
        text += piece
        count += 1
        if count == most_pieces:
            break
    return text


async def main() -> None:
    """Run both, then say what was free at the end."""
    with LLM(MODEL, max_model_len=256, num_threads=1) as llm:
        whole, part = await asyncio.gather(follow(llm, "def main(", 1000), follow(llm, "import os\n", 5))
        print(f"whole: {whole!r}\nleft early: {part!r}")
        llm.generate("x", SamplingParams(max_tokens=1))  # the abort arrived before this
        print(f"KV blocks in use: {llm.stats.num_blocks_used}")


if __name__ == "__main__":
    asyncio.run(main())
