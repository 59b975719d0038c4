"""`n` and `best_of` through `LLM`: each output is that of a single request with the derived seed."""

import asyncio

import pytest

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.errors import RequestError
from tritium.sampling_params import child_seed
from tritium.testing.tiny_models import make_llama_with_tokenizer, random_prompt

VOCAB_SIZE = 400
PROMPT = random_prompt(40, VOCAB_SIZE, seed=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_llama_with_tokenizer(tmp_path_factory.mktemp("tiny") / "tiny-llama", vocab_size=VOCAB_SIZE)
    engine = build(path, output_dir=path.parent / "engine").path
    with LLM(engine, max_num_seqs=8, max_num_batched_tokens=32, num_threads=1) as llm:
        yield llm


def params(**more):
    return SamplingParams(**{"temperature": 1.2, "max_tokens": 10, "ignore_eos": True, "seed": 7, **more})


def test_output_i_is_that_of_a_request_with_the_derived_seed(llm):
    [output] = llm.generate([PROMPT], params(n=5, logprobs=1))
    assert [completion.index for completion in output.outputs] == list(range(5))
    for completion in output.outputs:
        [alone] = llm.generate([PROMPT], params(seed=child_seed(7, completion.index), logprobs=1))
        assert completion.token_ids == alone.outputs[0].token_ids
        assert completion.text == alone.outputs[0].text
        assert completion.logprobs == alone.outputs[0].logprobs
        assert completion.cumulative_logprob == sum(token.logprob for token in completion.logprobs)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 5
    assert llm.stats.num_blocks_used == 0


def test_best_of_is_the_front_of_all_samples_by_cumulative_logprob(llm):
    [every] = llm.generate([PROMPT], params(n=6, logprobs=0))
    [best] = llm.generate([PROMPT], params(n=2, best_of=6))
    order = sorted(every.outputs, key=lambda completion: -completion.cumulative_logprob)
    assert [completion.token_ids for completion in best.outputs] == [completion.token_ids for completion in order[:2]]
    assert [completion.index for completion in best.outputs] == [0, 1]
    assert all(completion.logprobs is None for completion in best.outputs)
    assert best.outputs[0].cumulative_logprob == order[0].cumulative_logprob


def test_streamed_pieces_of_several_samples_join_to_the_whole(llm):
    async def collect():
        return [out async for out in llm.generate_async(PROMPT, params(n=3))]

    pieces = asyncio.run(collect())
    [whole] = llm.generate([PROMPT], params(n=3))
    for completion in whole.outputs:
        mine = [out.outputs[0] for out in pieces if out.outputs[0].index == completion.index]
        assert [t for piece in mine for t in piece.token_ids] == completion.token_ids
        assert "".join(piece.text for piece in mine) == completion.text
    assert [out.finished for out in pieces] == [False] * (len(pieces) - 1) + [True]


def test_leaving_a_stream_of_samples_early_aborts_them_all(llm):
    async def first_piece():
        stream = llm.generate_async(PROMPT, params(n=6, max_tokens=80))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(first_piece())
    llm.generate("x", SamplingParams(max_tokens=1))
    assert llm.stats.num_running == llm.stats.num_waiting == llm.stats.num_blocks_used == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "n must be an integer from 1 to 128, not 0"),
        ({"n": 10**6}, "not 1000000"),
        ({"n": 2**63}, "not 9223372036854775808"),
        ({"n": 4, "best_of": 3}, "best_of must be an integer from 4 to 128, not 3"),
        ({"best_of": 129}, "best_of must be an integer from 1 to 128, not 129"),
        ({"n": 2, "temperature": 0}, "n=2, best_of=None with temperature=0, .*all outputs would be equal"),
        ({"best_of": 2, "top_k": 1}, "best_of=2 with .* top_k=1"),
    ],
)
def test_fan_out_is_bounded_and_equal_outputs_are_refused(fields, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**fields)
