"""Chat: a conversation of two turns; the second finds the first in the prefix cache.

python examples/chat.py
"""

from pathlib import Path

from tritium import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model"
QUESTIONS = ["Read a file and count its lines.", "Now do it for every file in a directory."]


def main() -> None:
    """Each answer becomes part of the next prompt."""
    params = SamplingParams(temperature=0.6, seed=3, max_tokens=60)
    with LLM(MODEL, max_model_len=512, num_threads=1) as llm:
        messages = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            [output] = llm.chat(messages, params)
            answer = output.outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            print(f"user: {question}\nassistant: {answer}")
            print(f"({len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached)")


if __name__ == "__main__":
    main()
