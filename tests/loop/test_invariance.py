"""A request's numbers never depend on its neighbours: logits are compared bit for bit on the demo model."""

import dataclasses
import random
from pathlib import Path

import pytest

from tritium.compiler import build
from tritium.config import SCHEMES, RuntimeConfig
from tritium.testing.recorder import Recorder, assert_bit_equal, greedy_request
from tritium.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
NUM_PROMPTS = 64
BASE = RuntimeConfig(
    max_num_seqs=64, max_num_batched_tokens=512, kv_cache_memory=1 << 28, max_model_len=640, num_threads=1
)


def _formats():
    """(dtype, scheme, kv_dtype): plain ones; by default a quantised one is in test_family_invariance.py."""
    yield from [("float32", None, "auto"), ("bfloat16", None, "auto")]
    yield pytest.param(("bfloat16", "w8a8", "int8"), marks=pytest.mark.full)
    for scheme in SCHEMES:
        if scheme != "fp8":
            yield pytest.param(("bfloat16", scheme, "auto"), marks=pytest.mark.full)
    yield pytest.param(("float32", None, "int8"), marks=pytest.mark.full)


@pytest.fixture(scope="module", params=_formats(), ids=lambda names: "-".join(filter(None, names)))
def engine(request, tmp_path_factory):
    dtype, scheme, kv_dtype = request.param
    return build(
        DEMO, dtype=dtype, scheme=scheme, kv_dtype=kv_dtype, output_dir=tmp_path_factory.mktemp("engines") / "e"
    )


@pytest.fixture(scope="module")
def prompts(engine):
    """64 pieces of real text of 1 to 300 tokens; every fourth begins like the one before it."""
    ids = Tokenizer.from_directory(engine.path).encode((DEMO / "heldout.txt").read_text()[:200_000])
    draw = random.Random(0)
    prompts: list[list[int]] = []
    for i in range(NUM_PROMPTS):
        length = draw.choice((1, 2, 3, 15, 16, 17, 40, 64, 65, 100, 200, 300))
        start = draw.randrange(len(ids) - 400)
        prompts.append((prompts[-1][:64] if i % 4 == 3 else []) + ids[start : start + length])
    return prompts


def all_requests(prompts):
    return [greedy_request(f"r{i}", prompt, 3 + i % 7) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def alone(engine, prompts):
    """Each request's logits with nobody beside it and nothing cached: the expectation of every test here."""
    config = dataclasses.replace(BASE, enable_prefix_caching=False)
    recorder = Recorder(engine, config)
    logits = {}
    for request in all_requests(prompts):
        logits |= recorder.run([request])
    assert recorder.scheduler.stats.num_prefix_hit_tokens == 0
    return logits


def run(engine, config, requests, **more):
    recorder = Recorder(engine, config)
    logits = recorder.run(requests, **more)
    stats = recorder.scheduler.stats
    assert stats.num_blocks_used == 0, "blocks leaked"
    return logits, stats


def test_all_in_flight_together_equals_alone(engine, prompts, alone):
    logits, stats = run(engine, BASE, all_requests(prompts))
    assert stats.num_steps < 60  # they really were in flight together: alone they take about 390 steps
    assert_bit_equal(logits, alone)


@pytest.mark.parametrize("chunk", [16, 512])
def test_prompts_cut_into_chunks_equal_whole_ones(engine, prompts, alone, chunk):
    config = dataclasses.replace(BASE, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 64))
    logits, _ = run(engine, config, all_requests(prompts))
    assert_bit_equal(logits, alone)


def test_cached_prefixes_change_no_bit(engine, prompts, alone):
    recorder = Recorder(engine, BASE)
    recorder.run(all_requests(prompts))
    before = recorder.scheduler.stats.num_prefix_hit_tokens
    logits = recorder.run(all_requests(prompts))
    assert recorder.scheduler.stats.num_prefix_hit_tokens - before > 2000
    assert_bit_equal(logits, alone)


@pytest.mark.parametrize("is_caching", [True, False])
def test_preempted_and_recomputed_requests_equal_undisturbed_ones(engine, prompts, is_caching):
    """Sixteen that grow to 7 blocks each in a pool of 40: admitted while short, then too many."""
    requests = [lambda i=i: greedy_request(f"p{i}", prompts[i][:24], 80) for i in range(16)]
    calm = Recorder(engine, dataclasses.replace(BASE, enable_prefix_caching=False))
    expected: dict = {}
    for make in requests:
        expected |= calm.run([make()])
    config = dataclasses.replace(
        BASE, kv_cache_memory=41 * calm.executor.memory.block_bytes, enable_prefix_caching=is_caching
    )
    logits, stats = run(engine, config, [make() for make in requests])
    assert stats.num_preemptions > 0
    assert_bit_equal(logits, expected)


def test_aborts_all_around_change_nothing_for_the_others(engine, prompts, alone):
    requests = all_requests(prompts)
    doomed = [greedy_request(f"doomed{i}", prompts[i][::-1], 50) for i in range(0, NUM_PROMPTS, 3)]
    mixed = [r for i, request in enumerate(requests) for r in ([request, doomed[i // 3]] if i % 3 == 0 else [request])]
    draw = random.Random(1)
    left = [r.request_id for r in doomed]
    draw.shuffle(left)

    def abort_one(recorder, step):
        if left:
            recorder.scheduler.abort(left.pop())

    config = dataclasses.replace(BASE, max_num_batched_tokens=128)
    logits, _ = run(engine, config, mixed, after_step=abort_one)
    assert not left
    assert_bit_equal(logits, alone)


def test_every_number_of_rows_gives_the_same_bits(engine, prompts, alone):
    """For every M from 1 to 64: one request decodes beside M - 1 others."""
    recorder = Recorder(engine, dataclasses.replace(BASE, enable_prefix_caching=False))
    expected = {"r14": alone["r14"]}  # three tokens: a prefill and two steps of M rows
    for count in range(1, NUM_PROMPTS + 1):
        beside = [greedy_request(f"n{i}", [7 + i], 3) for i in range(count - 1)]
        assert_bit_equal(recorder.run([*beside, all_requests(prompts)[14]]), expected)


def test_the_number_of_threads_changes_no_bit(engine, prompts, alone):
    logits, _ = run(engine, dataclasses.replace(BASE, num_threads=2), all_requests(prompts)[:16])
    assert_bit_equal(logits, {f"r{i}": alone[f"r{i}"] for i in range(16)})
