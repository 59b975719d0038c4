"""What a request asks of its tokens, in every pair of features: in flight, preempted, on cached prefixes = alone.

Each combination of features is a request. `alone` answers it with nobody beside it, nothing cached and room to spare;
the crowd answers all at once. Tokens, text, finish reasons and logprobs have to be the same, bit for bit.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.runtime.outputs import RequestOutput
from tritium.testing.tiny_models import make_llama_with_tokenizer, random_prompt

VOCAB_SIZE = 400
LIMITS = {"max_num_batched_tokens": 24, "num_threads": 1, "block_size": 4}
BLOCK_BYTES = 3 * 2 * 2 * 16 * 4 * 4  # layers, k and v, kv heads, head size, tokens, fp32
PREFIX = random_prompt(40, VOCAB_SIZE, seed=0)


def lower_every_third(prompt: Sequence[int], outputs: Sequence[int], row: np.ndarray) -> None:
    row[len(outputs) % 3 :: 3] -= 4


FEATURES: dict[str, tuple[dict[str, Any], ...]] = {
    "logprobs": ({}, {"logprobs": 4}),
    "n": ({}, {"n": 3}, {"n": 2, "best_of": 4}),
    "stop": ({}, {"stop": ["e", "er", "\n"], "min_tokens": 4}, {"stop_token_ids": list(range(0, 400, 17))}),
    "penalties": ({}, {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}),
    "prefix": ({}, {"prefix": True}),
    "bans": ({}, {"bad_words": ["a", "the", "or"], "logit_bias": {5: 3.0, 77: -2.0}}),
    "prompt_logprobs": ({}, {"prompt_logprobs": 2}),
    "processors": ({}, {"logits_processors": lower_every_third}),
}
Case = tuple[int, ...]  # which value of each feature


def pairwise() -> list[Case]:
    """A few cases in which every two values of every two features meet; greedily chosen, always the same."""
    every = list(itertools.product(*(range(len(values)) for values in FEATURES.values())))
    unmet = {pair for case in every for pair in pairs(case)}
    cases = []
    while unmet:
        cases.append(max(every, key=lambda case: len(unmet & pairs(case))))
        unmet -= pairs(cases[-1])
    return cases


def pairs(case: Case) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))


def request_of(case: Case) -> tuple[list[int], SamplingParams]:
    fields: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 28, "ignore_eos": True}
    for values, choice in zip(FEATURES.values(), case, strict=True):
        fields |= values[choice]
    own = random_prompt(5 + sum(case), VOCAB_SIZE, seed=hash(case) % 1000)
    return (PREFIX if fields.pop("prefix", False) else own[::-1]) + own, SamplingParams(**fields)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_llama_with_tokenizer(tmp_path_factory.mktemp("tiny") / "tiny-llama", vocab_size=VOCAB_SIZE)
    return build(path, output_dir=path.parent / "engine").path


@pytest.fixture(scope="module")
def alone(engine: Path) -> Iterator[LLM]:
    with LLM(engine, max_num_seqs=8, enable_prefix_caching=False, **LIMITS) as llm:
        yield llm


def facts(output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt_logprobs": output.prompt_logprobs,
        "error": output.error,
        "outputs": [
            (c.index, c.text, c.token_ids, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason)
            for c in output.outputs
        ],
    }


def check(cases: list[Case], alone: LLM, engine: Path, *, is_tight: bool) -> None:
    """Answer all cases at once, and compare."""
    requests = [request_of(case) for case in cases]
    room = {"kv_cache_memory": 36 * BLOCK_BYTES} if is_tight else {}
    with LLM(engine, max_num_seqs=7, **LIMITS, **room) as llm:
        llm.generate([PREFIX], SamplingParams(max_tokens=1))
        outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
        stats = llm.stats
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert (stats.num_preemptions > 0) == is_tight
        assert stats.num_prefix_hit_tokens > 0
    for case, (prompt, params), output in zip(cases, requests, outputs, strict=True):
        [expected] = alone.generate([prompt], params)
        assert facts(output) == facts(expected), f"features {dict(zip(FEATURES, case, strict=True))}"


def test_the_pairs_are_few_and_cover_what_they_should() -> None:
    cases = pairwise()
    assert len(cases) <= 14
    met = {pair for case in cases for pair in pairs(case)}
    sizes = [len(values) for values in FEATURES.values()]
    assert len(met) == sum(a * b for a, b in itertools.combinations(sizes, 2))


@pytest.mark.parametrize("is_tight", [False, True], ids=["room to spare", "preempted"])
def test_every_pair_of_features_in_flight_gives_what_each_request_gives_alone(
    alone: LLM, engine: Path, is_tight: bool
) -> None:
    check(pairwise(), alone, engine, is_tight=is_tight)


@pytest.mark.full
@pytest.mark.parametrize("is_tight", [False, True], ids=["room to spare", "preempted"])
def test_the_full_product_of_features_in_flight_gives_what_each_request_gives_alone(
    alone: LLM, engine: Path, is_tight: bool
) -> None:
    every = list(itertools.product(*(range(len(values)) for values in FEATURES.values())))
    check(every, alone, engine, is_tight=is_tight)
