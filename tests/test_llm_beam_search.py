"""`LLM.beam_search` against transformers' `generate(num_beams=...)`: the same sequences, the same scores."""

import pytest
import torch

from tritium import LLM, BeamSearchParams
from tritium.compiler import build
from tritium.errors import EngineError, RequestError, RequestTooLarge
from tritium.testing.tiny_configs import TINY_MODELS
from tritium.testing.tiny_models import make_checkpoint, make_llama_with_tokenizer, random_prompt, reference_model

VOCAB_SIZE = 400
PROMPTS = [random_prompt(length, VOCAB_SIZE, seed=length) for length in (1, 7, 33, 50)]
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_llama_with_tokenizer(tmp_path_factory.mktemp("tiny") / "tiny-llama", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def engine(model_dir):
    return build(model_dir, output_dir=model_dir.parent / "engine")


@pytest.fixture(scope="module")
def llm(engine):
    with LLM(engine.path, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model_dir):
    return reference_model(model_dir)


def assert_equals_transformers(llm, reference, prompts, params, eos):
    outputs = llm.beam_search(prompts, params)
    for ids, output in zip(prompts, outputs, strict=True):
        expected = reference.generate(
            torch.tensor([ids]),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=VOCAB_SIZE - 1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for mine, tokens, score in zip(
            output.sequences, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
        ):
            padded = [*ids, *mine.token_ids]
            assert padded == tokens[: len(padded)] and set(tokens[len(padded) :]) <= {VOCAB_SIZE - 1}
            assert mine.score == pytest.approx(score, abs=1e-4)
    assert llm.stats.num_running == llm.stats.num_waiting == llm.stats.num_blocks_used == 0
    return outputs


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("beam_width", "length_penalty"), [(2, 1.0), (4, 0.0), (5, -0.7), (3, 2.0)])
def test_sequences_and_scores_equal_transformers(llm, reference, beam_width, length_penalty, early_stopping):
    # ends must come about for the rules to matter: with many eos ids they do
    params = BeamSearchParams(
        beam_width=beam_width,
        max_tokens=12,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_token_ids=tuple(range(0, VOCAB_SIZE - 1, 13)),
    )
    eos = sorted({*params.stop_token_ids, *llm.tokenizer.eos_token_ids})
    outputs = assert_equals_transformers(llm, reference, PROMPTS[:2], params, eos)
    lengths = {len(sequence.token_ids) for output in outputs for sequence in output.sequences}
    assert len(lengths) > 1, "no sequence ended before the limit"


def test_without_an_end_all_sequences_are_as_long_as_may_be_and_prefixes_are_shared(llm, reference):
    before = llm.stats
    params = BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True)
    assert_equals_transformers(llm, reference, PROMPTS, params, None)
    assert llm.stats.num_prefix_hit_tokens - before.num_prefix_hit_tokens > 1000


def test_a_model_with_two_kv_groups_searches_as_transformers_does(tmp_path):
    path = make_checkpoint(tmp_path / "gemma", TINY_MODELS["gemma2"] | {"vocab_size": VOCAB_SIZE})
    reference = reference_model(path)
    with LLM(build(path, output_dir=tmp_path / "engine").path, **LIMITS) as llm:
        params = BeamSearchParams(beam_width=3, max_tokens=10, ignore_eos=True)
        assert_equals_transformers(llm, reference, PROMPTS[1:3], params, None)


def test_text_comes_with_its_sequences_and_the_context_ends_them(llm):
    [output] = llm.beam_search("def main(", BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True))
    assert output.prompt == "def main("
    for sequence in output.sequences:
        assert sequence.text == llm.tokenizer.decode(sequence.token_ids)
    [output] = llm.beam_search(
        [random_prompt(120, VOCAB_SIZE, seed=3)], BeamSearchParams(beam_width=2, ignore_eos=True)
    )
    assert [len(sequence.token_ids) for sequence in output.sequences] == [8, 8]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beam_width": 0}, "beam_width must be an integer from 1 to 64, not 0"),
        ({"beam_width": 65}, "not 65"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number from -10.0 to 10.0, not nan"),
        ({"early_stopping": "soon"}, "early_stopping must be true, false or 'never', not 'soon'"),
        ({"beam_with": 3}, "did you mean 'beam_width'"),
        ({"ignore_eos": 2}, "ignore_eos must be true or false, not 2"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(fields, words):
    with pytest.raises(RequestError, match=words):
        BeamSearchParams(**{"beam_width": 2, **fields})


def test_a_search_that_needs_too_many_alternatives_or_too_much_room_is_refused(llm):
    with pytest.raises(RequestError, match=r"beam_width=64 with 5[12] stop ids needs 3\d+ alternatives .* at most 256"):
        llm.beam_search("x", BeamSearchParams(beam_width=64, stop_token_ids=tuple(range(50, 100))))
    with pytest.raises(RequestTooLarge, match="128"):
        llm.beam_search([list(range(3, 131))], BeamSearchParams(beam_width=2))
    with pytest.raises(RequestError, match="empty"):
        llm.beam_search([[]], BeamSearchParams(beam_width=2))
    llm.generate("x")
    assert llm.stats.num_blocks_used == 0


def test_a_closed_llm_says_so(engine):
    llm = LLM(engine.path, **LIMITS)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.beam_search("x", BeamSearchParams(beam_width=2))
