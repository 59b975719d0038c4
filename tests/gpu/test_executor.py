"""A whole engine on the GPU, or, where there is none, on one that is made up: the tokens and numbers of a CPU's engine.

What is asked for here is the executor's: chunks of prompts, steps met often enough to be replayed, rows that the host
samples, prompts that are scored, and that every step can be timed. Kernels have tests of their own.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.engine.environment import gpu_environment, over_blocks
from tritium.engine.tactics import Choice, Tactics
from tritium.runtime.outputs import CompletionOutput, RequestOutput
from tritium.testing.fake_cuda import pretend_to_have_a_gpu
from tritium.testing.plain_models import PlainLlama
from tritium.tuner.sites import sites, time_key
from tritium.tuner.timing_cache import TimingCache
from tritium.tuner.tune import tune_engine

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
PROMPTS = [[3, 5, 7], list(range(20)), [9] * 11, [4]]
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_memory": 4 << 20}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    torch.manual_seed(0)
    model, place = PlainLlama(size=64, head_size=16, num_layers=1), tmp_path_factory.mktemp("engines")
    return {d: build(model, output_dir=place / d, max_model_len=64, device=d) for d in ("cpu", "cuda")}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        pretend_to_have_a_gpu(monkeypatch.setattr)


def run(path: Path, prompts: Sequence[list[int]], **params: Any) -> list[RequestOutput]:
    with LLM(path, **LIMITS) as llm:
        params = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params}
        return llm.generate(prompts, SamplingParams(**params), use_progress=False)


def of_both(engines: dict[str, Engine], prompts: Sequence[list[int]], **params: Any) -> list[list[CompletionOutput]]:
    return [[out.outputs[0] for out in run(engines[d].path, prompts, **params)] for d in ("cpu", "cuda")]


def test_chunks_of_prompts_and_replayed_steps_give_a_cpus_tokens(engines: dict[str, Engine]) -> None:
    wanted, found = of_both(engines, PROMPTS)
    assert [out.token_ids for out in found] == [out.token_ids for out in wanted]
    assert [len(out.token_ids) for out in found] == [6] * 4


def test_rows_that_the_host_samples_have_a_cpus_tokens_and_numbers(engines: dict[str, Engine]) -> None:
    wanted, found = of_both(engines, PROMPTS[:2], logprobs=2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)


def test_a_prompt_is_scored_as_on_a_cpu(engines: dict[str, Engine]) -> None:
    [wanted], [found] = (run(engines[d].path, PROMPTS[1:2], prompt_logprobs=1) for d in ("cpu", "cuda"))
    assert wanted.prompt_logprobs is not None and found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == 20 and found.prompt_logprobs[0] is None
    pairs = zip(PROMPTS[1][1:], wanted.prompt_logprobs[1:], found.prompt_logprobs[1:], strict=True)
    for token, theirs, ours in pairs:
        assert theirs is not None and ours is not None and ours.token_id == token
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("block_size", [16, 32])
def test_every_step_of_a_batch_is_timed(
    block_size: int, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritium.runtime.gpu import step_times

    for name, small in {"MOST_KEYS": 64, "LONGEST_CONTEXT": 8, "_MOST_NEW": 8, "_FEWEST_TOKENS": 32}.items():
        monkeypatch.setattr(step_times, name, small)
    timer = step_times.GpuStepTimer(engines["cuda"], [2, 20], largest_decode=4, block_size=block_size)
    for count in (2, 20, 2):
        times = timer.times(count, step_times.no_tactics(), 1)
        assert len(times) == len(engines["cuda"].plan.steps)
        assert all(0 < seconds < math.inf for seconds in times)
    assert timer._config.block_size == block_size
    timer.close()


def test_a_tactic_that_cannot_be_bound_leaves_the_timer_as_it_was(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritium.runtime.gpu import step_times

    for name, small in {"MOST_KEYS": 64, "LONGEST_CONTEXT": 8, "_MOST_NEW": 8, "_FEWEST_TOKENS": 32}.items():
        monkeypatch.setattr(step_times, name, small)
    engine = engines["cuda"]
    [site] = [s for s in sites(engine.plan, (), "cuda", is_thorough=False) if s.op == "paged_attention"]
    choice = Choice(site=site.key, steps=site.steps, kernel="gpu.paged_attention", tactics=((99, {"no_such": 1}),))
    timer = step_times.GpuStepTimer(engine, [2, 20], largest_decode=4)
    for count in (2, 20):
        with pytest.raises(TypeError, match="no_such"):
            timer.times(count, Tactics(environment={}, effort="measuring", choices=(choice,)), 1)
        assert all(0 < seconds < math.inf for seconds in timer.times(count, step_times.no_tactics(), 1))
    timer.close()


def test_over_other_blocks_than_it_was_tuned_for_an_engine_says_so_and_answers_alike(
    engines: dict[str, Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine.load(shutil.copytree(engines["cuda"].path, tmp_path / "e"))
    cache = TimingCache(over_blocks(gpu_environment(), 64), tmp_path / "timings.json")
    for site in sites(engine.plan, (), "cuda", is_thorough=False):
        cache.put(time_key(site, 1, site.candidates[0]), 1.0)
    assert tune_engine(engine, "none", cache).tactics is not None
    for block_size, times_said in ((64, 0), (16, 1)):
        caplog.clear()
        with LLM(engine.path, block_size=block_size, **LIMITS) as llm:
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            [found] = llm.generate(PROMPTS[:1], params, use_progress=False)
        assert caplog.text.count("was tuned for block_size=64 and runs with block_size=16") == times_said
        assert len(found.outputs[0].token_ids) == 2
