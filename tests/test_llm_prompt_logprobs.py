"""Prompt logprobs through `LLM`: transformers' numbers, however the prompt is cut, shared, preempted or accompanied."""

import asyncio

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.engine.arena import find_lifetimes
from tritium.errors import RequestError
from tritium.runtime.prompt_logprobs import scored_parts
from tritium.runtime.request import Request, SampledToken, ScheduledBatch, ScheduledSequence
from tritium.testing.tiny_configs import LLAMA
from tritium.testing.tiny_models import make_checkpoint, random_prompt, reference_model

VOCAB_SIZE = 199
PROMPTS = [random_prompt(length, VOCAB_SIZE, seed=length) for length in (1, 2, 9, 33, 100)]
SHORT = [random_prompt(length, VOCAB_SIZE, seed=length) for length in (14, 15, 16, 40, 31, 30)]
LIMITS = {"max_num_batched_tokens": 24, "num_threads": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama", LLAMA)


@pytest.fixture(scope="module")
def engine(model_dir):
    return build(model_dir, output_dir=model_dir.parent / "engine")


@pytest.fixture(scope="module")
def llm(engine):
    with LLM(engine.path, max_num_seqs=5, **LIMITS) as llm:  # rows go through in pieces of 5
        yield llm


def params(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 3, "ignore_eos": True, "prompt_logprobs": 2, **more})


def assert_are_those_of(reference, ids, found, count=2):
    assert len(found) == len(ids) and found[0] is None
    exact = torch.log_softmax(reference(torch.tensor([ids])).logits[0].detach().double(), -1)
    for position, token in enumerate(found[1:]):
        assert token.token_id == ids[position + 1]
        assert token.logprob == pytest.approx(float(exact[position, token.token_id]), abs=1e-3)
        top = exact[position].topk(count)
        assert [i for i, _ in token.top_logprobs] == top.indices.tolist()
        assert [p for _, p in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_prompts_in_flight_and_in_chunks_are_scored_as_transformers_does(llm, model_dir):
    reference = reference_model(model_dir)
    mixed = [params(), params(prompt_logprobs=None), params(), params(prompt_logprobs=0), params(logprobs=1)]
    outputs = llm.generate(PROMPTS, mixed)
    for index in (0, 2, 4):
        assert_are_those_of(reference, PROMPTS[index], outputs[index].prompt_logprobs)
    assert outputs[1].prompt_logprobs is None
    assert [token.top_logprobs for token in outputs[3].prompt_logprobs[1:]] == [()] * 32
    assert outputs[4].outputs[0].logprobs is not None
    plain = llm.generate(PROMPTS, params(prompt_logprobs=None))
    assert [out.outputs[0].token_ids for out in outputs] == [out.outputs[0].token_ids for out in plain]
    assert llm.stats.num_blocks_used == 0


def test_a_cached_prompt_is_computed_anew_for_its_logprobs_and_is_a_hit_for_others(llm):
    ids = random_prompt(60, VOCAB_SIZE, seed=9)
    llm.generate([ids], params(prompt_logprobs=None))
    [scored] = llm.generate([ids], params())
    assert scored.num_cached_tokens == 0 and len(scored.prompt_logprobs) == 60
    [again] = llm.generate([ids], params(prompt_logprobs=None))
    assert again.num_cached_tokens == 48


def test_preemption_loses_no_entry_and_changes_none(engine, llm):
    expected = [out.prompt_logprobs for out in llm.generate(SHORT, params())]
    block_bytes = 3 * 2 * 2 * 16 * 16 * 4  # layers, k and v, kv heads, head size, tokens, fp32
    with LLM(engine.path, max_num_seqs=4, kv_cache_memory=9 * block_bytes, **LIMITS) as small:
        outputs = small.generate(SHORT * 2, params(max_tokens=60))
        assert small.stats.num_preemptions > 0
        assert [out.prompt_logprobs for out in outputs] == expected * 2
        assert small.stats.num_blocks_used == 0


def test_several_samples_share_one_scored_prompt(llm):
    [expected] = llm.generate([PROMPTS[3]], params())
    sampled = {"temperature": 1.0, "seed": 1}
    for more in ({"n": 3}, {"n": 2, "best_of": 4}):
        [output] = llm.generate([PROMPTS[3]], params(**sampled, **more))
        assert output.prompt_logprobs == expected.prompt_logprobs
        assert len(output.outputs) == more["n"]


def test_a_stream_brings_them_once_with_its_first_tokens(llm):
    async def collect():
        return [out.prompt_logprobs async for out in llm.generate_async(PROMPTS[3], params())]

    first, *rest = asyncio.run(collect())
    assert first == llm.generate([PROMPTS[3]], params())[0].prompt_logprobs
    assert rest == [None, None]


def test_only_what_is_not_scored_yet_is_scored():
    request = Request("r", list(range(10)), SamplingParams(prompt_logprobs=1))
    other = Request("o", [1] * 5, SamplingParams())

    def parts(start, count):
        sequences = (ScheduledSequence(other, 0, 5, True), ScheduledSequence(request, start, count, False))
        return [(p.first_row, p.targets) for p in scored_parts(ScheduledBatch(sequences, (), (), 5 + count, 1))]

    assert parts(0, 4) == [(5, [1, 2, 3, 4])]
    request.prompt_logprobs += [SampledToken(1)] * 4  # then it was preempted
    assert request.num_reusable_tokens == 4
    assert parts(0, 3) == []
    assert parts(0, 6) == [(9, [5, 6])]
    assert parts(4, 6) == [(5, [5, 6, 7, 8, 9])]
    request.prompt_logprobs += [SampledToken(1)] * 5
    request.append_output(SampledToken(3))
    assert parts(0, 11) == [] and request.num_reusable_tokens == 10


def test_what_the_row_steps_read_of_all_tokens_lives_until_they_have_run_for_the_last_time(engine):
    plan = engine.plan
    first_row_step = next(i for i, step in enumerate(plan.steps) if step.phase == "rows")
    lifetimes = find_lifetimes(plan)
    views = {value.name: value.base for value in plan.values if value.kind == "view"}
    read = {getattr(arg, "value", None) for step in plan.steps[first_row_step:] for arg in step.args.values()}
    bases = {views.get(name, name) for name in read}
    crossing = [name for name in bases if name in lifetimes and lifetimes[name].first < first_row_step]
    assert len(crossing) >= 2  # the last attention's output and the residual
    assert all(lifetimes[name].last == len(plan.steps) for name in crossing)


def test_they_are_bounded():
    with pytest.raises(RequestError, match="prompt_logprobs must be an integer from 0 to 20, not 21"):
        SamplingParams(prompt_logprobs=21)
