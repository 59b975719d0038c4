"""A request's numbers never depend on its neighbours: several KV groups (Gemma 2), a mixture of experts (Mixtral);
with any one of the optional passes left out, with none of them, and of more families."""

import dataclasses

import pytest

from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.testing.pass_choices import ALL_ON, LEFT_OUT
from tritium.testing.recorder import Recorder, assert_bit_equal, greedy_request
from tritium.testing.tiny_models import make_checkpoint, random_prompt

LENGTHS = (1, 2, 3, 11, 12, 13, 30, 40)  # the window of Gemma 2 is 12
BASE = RuntimeConfig(
    max_num_seqs=16, max_num_batched_tokens=64, kv_cache_memory=1 << 24, max_model_len=112, num_threads=1
)
NUM_GROUPS = {"gemma2": 3, "mixtral": 1, "llama": 1, "gptj": 1}
NUM_BLOCKS = {1: 24, 3: 40}  # by groups: enough to begin eight requests, too few to end them all at once


def _engines():
    """(family, format, passes left out); by default two families with all passes, and a third quantised."""
    yield "llama", "w8a8 int8", ALL_ON
    for name in NUM_GROUPS:
        for dtype in ("float32", "bfloat16"):
            for choice in LEFT_OUT:
                is_default = name in ("gemma2", "mixtral") and choice == ALL_ON
                yield pytest.param((name, dtype, choice), marks=() if is_default else pytest.mark.full)


@pytest.fixture(scope="module", params=_engines(), ids=lambda names: "-".join(names).replace(" ", "_"))
def engine(request, tmp_path_factory):
    name, dtype, choice = request.param
    quantised = {"dtype": "bfloat16", "scheme": "w8a8", "kv_dtype": "int8"}
    chosen = quantised if dtype == "w8a8 int8" else {"dtype": dtype}
    path = tmp_path_factory.mktemp("engine")
    model = make_checkpoint(path / "model", name)
    built = build(model, output_dir=path / name, disabled_passes=LEFT_OUT[choice], **chosen)
    assert len(built.plan.kv_groups) == NUM_GROUPS[name]
    return built


def all_requests():
    """Sixteen; every fourth begins like the one before it."""
    prompts = []
    for i in range(16):
        prompts.append((prompts[-1][:32] if i % 4 == 3 else []) + random_prompt(LENGTHS[i % 8], seed=i))
    return [greedy_request(f"r{i}", prompt, 3 + i % 7) for i, prompt in enumerate(prompts)]


def one_by_one(engine, requests):
    recorder = Recorder(engine, dataclasses.replace(BASE, enable_prefix_caching=False))
    logits = {}
    for request in requests:
        logits |= recorder.run([request])
    return logits


@pytest.fixture(scope="module")
def alone(engine):
    return one_by_one(engine, all_requests())


@pytest.mark.parametrize("chunk", [16, 64])
def test_all_in_flight_in_chunks_equals_alone(engine, alone, chunk):
    recorder = Recorder(engine, dataclasses.replace(BASE, max_num_batched_tokens=chunk))
    assert_bit_equal(recorder.run(all_requests()), alone)
    assert recorder.scheduler.stats.num_blocks_used == 0


def test_cached_prefixes_change_no_bit(engine, alone):
    recorder = Recorder(engine, BASE)
    recorder.run(all_requests())
    before = recorder.scheduler.stats.num_prefix_hit_tokens
    logits = recorder.run(all_requests())
    assert recorder.scheduler.stats.num_prefix_hit_tokens > before
    assert_bit_equal(logits, alone)


def test_preempted_and_recomputed_requests_equal_undisturbed_ones(engine):
    def requests():
        return [greedy_request(f"p{i}", random_prompt(8, seed=i), 60) for i in range(8)]

    bytes_per_block = Recorder(engine, BASE).executor.memory.block_bytes
    blocks = NUM_BLOCKS[len(engine.plan.kv_groups)]
    recorder = Recorder(engine, dataclasses.replace(BASE, kv_cache_memory=(1 + blocks) * bytes_per_block))
    logits = recorder.run(requests())
    assert recorder.scheduler.stats.num_preemptions > 0
    assert recorder.scheduler.stats.num_blocks_used == 0
    assert_bit_equal(logits, one_by_one(engine, requests()))
