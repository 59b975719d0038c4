"""One model of each later family from directory to tokens: `LLM` answers as transformers does, token for token.

By default two of them: runtime/test_executor.py holds every one to transformers beneath `LLM`."""

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.testing.tiny_models import make_checkpoint, random_prompt, reference_model

NUM_TOKENS = 32
LENGTHS = (3, 40)  # the second is longer than every window of TINY_MODELS
LONG = {"phi3-longrope": (33, 40)}  # transformers takes other factors for short sequences; an engine has one set
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "num_threads": 1}


ALL = ["stablelm", "stablelm-qk-norm", "phi3", "gpt_neox", "gpt_neox-sequential", "opt", "opt-post-norm", "qwen3"]


@pytest.mark.parametrize("name", ["gemma2", "phi3-longrope", *(pytest.param(n, marks=pytest.mark.full) for n in ALL)])
def test_an_answer_of_32_tokens_is_that_of_transformers(name, tmp_path):
    path = make_checkpoint(tmp_path / "model", name, seed=1)
    prompts = [random_prompt(length, seed=length) for length in LONG.get(name, LENGTHS)]
    with LLM(build(path, output_dir=tmp_path / "engine", max_model_len=80).path, **LIMITS) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    reference = reference_model(path)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
        )
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
