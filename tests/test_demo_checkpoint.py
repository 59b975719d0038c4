"""The bundled demo checkpoint, from its directory to text: the main job, on real input."""

from pathlib import Path

import pytest
import torch
import transformers

from tritium import LLM, SamplingParams

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
PROMPTS = [
    "def main(",
    "import os\n",
    "class Stack:\n    def push(self",
    "    for index, value in enumerate(",
    '"""Read a file',
    "x",
    "try:\n    import json\nexcept",
]
TIE = 1e-4  # logits of two tokens closer than this may be ordered either way


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO, dtype="float32", max_num_seqs=8, num_threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_greedy_text_is_that_of_transformers(llm, reference):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == tokenizer(prompt).input_ids
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(output.prompt_token_ids) - 1 : -1]
        for token, row in zip(output.outputs[0].token_ids, logits, strict=True):
            assert row.max() - row[token] < TIE
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)


def test_chat_prompts_have_the_ids_of_transformers(llm):
    messages = [{"role": "user", "content": "Write a loop."}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=4))
    assert output.prompt_token_ids == list(expected)
