"""What requests ask of their tokens, through `LLM` on a tiny model: transformers' generate is the oracle."""

import numpy as np
import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.errors import RequestError
from tritium.testing.tiny_models import make_llama_with_tokenizer, random_prompt, reference_model

VOCAB_SIZE = 400
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_threads": 1}
PROMPTS = [random_prompt(length, VOCAB_SIZE, seed=length) for length in (3, 17, 40)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_llama_with_tokenizer(tmp_path_factory.mktemp("tiny") / "tiny-llama", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(build(model_dir, output_dir=model_dir.parent / "engine").path, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model_dir):
    return reference_model(model_dir)


def greedy(llm, prompts, **params):
    outputs = llm.generate(prompts, SamplingParams(temperature=0, **{"max_tokens": 20, "ignore_eos": True, **params}))
    assert llm.stats.num_blocks_used == 0
    return [output.outputs[0].token_ids for output in outputs]


def oracle(reference, ids, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **options}
    return reference.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_gives_the_tokens_of_transformers(llm, reference, penalty):
    found = greedy(llm, PROMPTS, repetition_penalty=penalty)
    assert found == [oracle(reference, ids, repetition_penalty=penalty) for ids in PROMPTS]
    assert found != greedy(llm, PROMPTS)


def test_bad_words_give_the_tokens_of_transformers(llm, reference):
    free = greedy(llm, PROMPTS)
    words = [llm.tokenizer.decode(tokens[i : i + k]) for tokens in free for i in range(0, 20, 3) for k in (1, 2)]
    words = [word for word in words if word.strip() and "�" not in word]
    assert len(words) > 10
    spelled = [
        llm.tokenizer.encode(text, add_special_tokens=False)
        for word in words
        for text in (word.lstrip(), " " + word.lstrip())
    ]
    found = greedy(llm, PROMPTS, bad_words=words)
    assert found == [oracle(reference, ids, bad_words_ids=spelled) for ids in PROMPTS]
    assert found != free


def test_min_tokens_gives_the_tokens_of_transformers(llm, reference):
    stop = greedy(llm, PROMPTS)[0][2]
    for min_tokens in (0, 2, 3, 9):
        found = greedy(llm, PROMPTS, min_tokens=min_tokens, stop_token_ids=[stop])
        more = {"min_new_tokens": min_tokens, "eos_token_id": stop, "pad_token_id": stop}
        assert found == [oracle(reference, ids, **more) for ids in PROMPTS]


def test_a_bias_lifts_a_token_and_an_allowed_list_is_all_there_is(llm):
    [tokens] = greedy(llm, PROMPTS[:1], logit_bias={77: 100.0}, max_tokens=3)
    assert tokens == [77, 77, 77]
    [tokens] = greedy(llm, PROMPTS[:1], logit_bias={77: 100.0}, frequency_penalty=2.0, allowed_token_ids=[5, 6])
    assert set(tokens) == {5, 6}


def test_a_custom_processor_sees_its_request_and_chooses(llm):
    calls = []

    def count_up(prompt, outputs, row):
        calls.append((list(prompt), len(outputs)))
        row[:] = -np.inf
        row[100 + len(outputs)] = 0

    params = [SamplingParams(max_tokens=4, ignore_eos=True, logits_processors=count_up), SamplingParams(temperature=0)]
    first, second = llm.generate(PROMPTS[:2], params)
    assert first.outputs[0].token_ids == [100, 101, 102, 103]
    assert calls == [(PROMPTS[0], count) for count in range(4)]
    assert second.outputs[0].token_ids == greedy(llm, PROMPTS[1:2], max_tokens=16, ignore_eos=False)[0]


def test_a_processor_that_raises_ends_its_request_and_no_other(llm):
    def fails_at_three(prompt, outputs, row):
        if len(outputs) == 3:
            raise ArithmeticError("no more")

    bad = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logits_processors=[fails_at_three])
    good = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    first, second = llm.generate(PROMPTS[:2], [bad, good])
    assert "fails_at_three raised ArithmeticError: no more" in first.error
    assert first.outputs[0].finish_reason == "error" and len(first.outputs[0].token_ids) == 3
    assert second.outputs[0].token_ids == greedy(llm, PROMPTS[1:2])[0]


def test_text_is_made_only_when_it_is_wanted_and_long_prompts_are_cut_from_the_left(llm):
    [whole] = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    [silent] = llm.generate(
        [PROMPTS[2]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
    )
    assert (silent.outputs[0].text, silent.outputs[0].token_ids) == ("", whole.outputs[0].token_ids)
    [cut] = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=7))
    assert cut.prompt_token_ids == PROMPTS[2][-7:]
    [short] = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=7))
    assert short.prompt_token_ids == PROMPTS[0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias has token id 400; the model's ids are 0 to 399"),
        ({"allowed_token_ids": [3, 1 << 30]}, "allowed_token_ids has token id 1073741824"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids has token id 400"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused_by_name(llm, params, words):
    with pytest.raises(RequestError, match=words):
        llm.generate("x", SamplingParams(**params))
    assert llm.stats.num_blocks_used == 0


def test_banning_everything_ends_the_request_and_says_why(llm):
    params = SamplingParams(allowed_token_ids=[llm.tokenizer.encode("x")[0]], bad_words=["x"])
    [output] = llm.generate("abc", params)
    assert output.outputs[0].finish_reason == "error"
    assert "no token is left to choose: allowed_token_ids, bad_words" in output.error
