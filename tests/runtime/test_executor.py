"""The executor on real plans: transformers' logits in any batch, the same bits in every batch, trouble contained."""

import dataclasses
import logging

import msgspec
import pytest
import torch

from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.runtime import kernel_choice
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.engine_loop import EngineLoop
from tritium.runtime.executor import Executor
from tritium.runtime.request import Request
from tritium.sampling_params import SamplingParams
from tritium.testing.tiny_models import (
    TINY_MODELS,
    make_checkpoint,
    random_prompt,
    reference_logits,
    reference_model,
    relative_error,
)

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "num_threads": 1, "max_model_len": 96}
LENGTHS = (1, 2, 7, 16, 33, 47, 60, 21)
NUM_OUTPUTS = 8
NUM_PARITY = 32  # greedy outputs compared with transformers: the longest prompt and they fit in `max_model_len`


class Recorder:
    """An executor that keeps every sampled row's logits: {request id: [logits of its 1st token, ...]}."""

    def __init__(self, executor):
        self.executor = executor
        self.logits = {}

    def execute(self, batch):
        step = self.executor.prepare(batch)
        self.executor.launch(step)
        sampled = [s.request for s in batch.sequences if s.is_sampled]
        for request, row in zip(sampled, self.executor.logits(step), strict=True):
            self.logits.setdefault(request.request_id, []).append(row.clone())
        return self.executor.sample(step)


class Run:
    """An engine's loop with a recorder, and what came out."""

    def __init__(self, engine, **limits):
        config = RuntimeConfig(**{**LIMITS, **limits})
        executor = Executor(engine, config)
        self.recorder = Recorder(executor)
        self.loop = EngineLoop(make_scheduler(engine, config, executor), self.recorder)
        self.outputs = {}

    def generate(self, prompts, num_outputs=NUM_OUTPUTS, names=None):
        """Greedy outputs of all prompts in flight together; their logits are in `recorder.logits`."""
        params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            name = names[i] if names else str(i)
            self.loop.submit(Request(name, prompt, params), lambda out: self.outputs.update({out.request_id: out}))
        while self.loop.has_work:
            self.loop.step()
        assert self.loop.scheduler.stats.num_blocks_used == 0
        return [self.outputs[names[i] if names else str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama")
    return build(path, output_dir=path.parent / "engine")


def prompts_of(lengths=LENGTHS):
    return [random_prompt(length, seed=length) for length in lengths]


def logits(run, name):
    return torch.stack(run.recorder.logits[name])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_and_greedy_tokens_in_flight_are_those_of_transformers(name, tmp_path):
    path = make_checkpoint(tmp_path / "model", name)
    engine = build(path, output_dir=tmp_path / "engine", max_model_len=96)
    run, reference = Run(engine), reference_model(path)
    prompts = prompts_of()
    for i, (prompt, output) in enumerate(zip(prompts, run.generate(prompts, NUM_PARITY), strict=True)):
        assert len(output.token_ids) == NUM_PARITY
        known = [*prompt, *output.token_ids[:-1]]
        filled = [*known, *[3] * (96 - len(known))]  # changes nothing before it, but dynamic RoPE sees the full length
        expected = reference_logits(reference, filled)[len(prompt) - 1 : len(known)]
        assert relative_error(logits(run, str(i)).float(), expected) < 1e-4
        gaps = expected.topk(2).values
        for token, row, (first, second) in zip(output.token_ids, expected, gaps.tolist(), strict=True):
            assert token == row.argmax() or first - second < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_have_the_same_bits_alone_in_a_crowd_in_chunks_and_after_preemption(dtype, tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    engine = build(path, output_dir=tmp_path / "engine", dtype=dtype)
    alone, prompts = Run(engine), prompts_of()
    for i, prompt in enumerate(prompts):
        alone.generate([prompt], 30, names=[str(i)])
    crowd, chunked = Run(engine), Run(engine, max_num_batched_tokens=8)
    tight = Run(engine, kv_cache_memory=13 * crowd.recorder.executor.memory.block_bytes)
    for other in (crowd, chunked, tight):
        other.generate(prompts, 30)
        for i in range(len(prompts)):
            assert torch.equal(logits(other, str(i)), logits(alone, str(i)))
    assert tight.loop.scheduler.stats.num_preemptions > 0
    again = crowd.generate(prompts, 30, names=[f"again-{i}" for i in range(len(prompts))])
    assert sum(output.num_cached_tokens for output in again) > 0
    for i in range(len(prompts)):
        assert torch.equal(logits(crowd, f"again-{i}"), logits(alone, str(i)))


@pytest.fixture
def no_library(monkeypatch):
    """The compiled kernels cannot be used: torch runs the plan."""
    monkeypatch.setattr(kernel_choice.library, "available", lambda: False)
    monkeypatch.setattr(kernel_choice.library, "why_not", lambda: "no C++ compiler: CXX is empty")
    kernel_choice.available_backends.cache_clear()
    yield
    kernel_choice.available_backends.cache_clear()


def test_only_bitwise_engines_pay_for_row_multiples(llama, no_library):
    fast = dataclasses.replace(llama, manifest=msgspec.structs.replace(llama.manifest, invariance="fast"))
    buckets = {}
    for name, engine in (("bitwise", llama), ("fast", fast)):
        executor = Run(engine).recorder.executor
        buckets[name] = executor.steps.token_counts
    assert buckets == {"bitwise": {32}, "fast": {1}}
    expected = [output.token_ids for output in Run(llama).generate(prompts_of())]
    assert [output.token_ids for output in Run(fast).generate(prompts_of())] == expected


def test_nan_ends_its_own_request_and_poisons_neither_neighbours_nor_reused_blocks(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    good = build(path, output_dir=tmp_path / "good")
    prompts = prompts_of()
    expected = [output.token_ids for output in Run(good).generate(prompts)]
    unused = next(t for t in range(3, 199) if not any(t in [*p, *e] for p, e in zip(prompts, expected, strict=True)))
    weights = {name: tensor.clone() for name, tensor in reference_model(path).state_dict().items()}
    weights["model.embed_tokens.weight"][unused] = torch.nan
    run = Run(build(path, output_dir=tmp_path / "bad", weights=weights), max_num_seqs=9)
    outputs = run.generate([*prompts, [5, 6, unused, *range(10, 50)]])
    assert outputs[-1].finish_reason == "error"
    assert "not finite" in outputs[-1].error
    assert [output.token_ids for output in outputs[:-1]] == expected
    filling = run.generate(prompts, names=[f"second-{i}" for i in range(len(prompts))])
    assert [output.token_ids for output in filling] == expected


def test_a_kernel_that_raises_ends_its_step_and_the_engine_goes_on(llama):
    run = Run(llama)
    expected = [output.token_ids for output in run.generate(prompts_of())]
    thunks = run.recorder.executor.steps.tokens(1)

    def broken():
        raise FloatingPointError("in the kernel")

    thunks.append(broken)
    [failed] = run.generate([[9, 10]], names=["bad"])
    assert failed.error == "FloatingPointError: in the kernel"
    thunks.remove(broken)
    again = run.generate(prompts_of(), names=[f"again-{i}" for i in range(len(LENGTHS))])
    assert [output.token_ids for output in again] == expected


def test_without_the_compiled_library_torch_runs_the_same_plan_and_says_so_once(llama, request, caplog):
    expected = Run(llama).generate(prompts_of())
    request.getfixturevalue("no_library")
    with caplog.at_level(logging.WARNING, "tritium"):
        runs = [Run(llama), Run(llama)]
    assert {kernel.backend for kernel in runs[0].recorder.executor._kernels} == {"eager"}
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "CXX is empty" in warning
    found = runs[0].generate(prompts_of())
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]


def test_null_kernels_run_the_host_side_only(llama):
    config = RuntimeConfig(**LIMITS)
    executor = Executor(llama, config, is_null=True)
    loop = EngineLoop(make_scheduler(llama, config, executor), executor)
    heard = []
    loop.submit(Request("r", [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)), heard.append)
    while loop.has_work:
        loop.step()
    assert heard[0].token_ids == (0, 0, 0, 0)  # what a null sampler chooses
    assert len(heard[0].logprobs[0].top_logprobs) == 2


def test_dummy_weights_are_generated_and_the_same_each_time(tmp_path):
    path = make_checkpoint(tmp_path / "model", "llama")
    engine = build(path, output_dir=tmp_path / "engine", weights="dummy")
    outputs = [Run(engine).generate(prompts_of()) for _ in range(2)]
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    assert len({t for o in outputs[0] for t in o.token_ids}) > 8
