"""One model in two processes, each with a part of every layer; they answer as one process does.

python examples/tensor_parallel.py [MODEL]    a directory or hub id; without one, the demo checkpoint
"""

import sys
from typing import Any

from tritium import LLM, SamplingParams

PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(3, 40)))
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory": 8 << 20, "num_threads": 1}


def main() -> None:
    model = sys.argv[1] if sys.argv[1:] else "examples/demo_model"
    answers = []
    for num_ranks in (1, 2):
        with LLM(model, dtype="float32", tensor_parallel=num_ranks, **LIMITS) as llm:  # on GPUs: device="cuda"
            outputs = llm.generate(PROMPTS, PARAMS, use_progress=False)
            size = (llm.engine.path / "weights.safetensors").stat().st_size
        answers.append([output.outputs[0].token_ids for output in outputs])
        print(f"{num_ranks} of 2 processes: {size:,} bytes of weights in each")
    print(f"same tokens: {answers[0] == answers[1]}")


if __name__ == "__main__":
    main()
