"""A model in two processes, started by whoever opens it: the answers of one process, one clear end when one is lost."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError, OutOfMemory, RequestError
from tritium.runtime.gloo import GlooCommunicator
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks import launch, loop
from tritium.runtime.ranks.alike import describe_model
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.ranks.peers import Peers
from tritium.runtime.request import Request
from tritium.testing.tiny_models import TINY_MODELS, make_checkpoint, random_prompt

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory": 1 << 20, "num_threads": 1}
MODEL = TINY_MODELS["llama"] | {"vocab_size": 200}
PROMPTS = [random_prompt(length, 199, seed=length) for length in (3, 17, 40, 9, 5)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True, n=2),
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, repetition_penalty=1.3, logit_bias={5: 2.0}),
    SamplingParams(temperature=1.0, seed=3, max_tokens=20, min_tokens=3, stop_token_ids=[7, 9], logprobs=2),
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=1),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    place = tmp_path_factory.mktemp("ranks")
    model = make_checkpoint(place / "model", MODEL)
    return {
        "alone": build(model, output_dir=place / "alone"),
        "shared": build(model, output_dir=place / "shared", tensor_parallel=2),
    }


@pytest.fixture(scope="module")
def shared(engines: dict[str, Engine]) -> Iterator[LLM]:
    with LLM(engines["shared"].path.parent, **LIMITS) as llm:
        yield llm


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_progress=False)
    return [one.token_ids for output in outputs for one in output.outputs]


def rank_processes() -> list[int]:
    """The processes of other ranks that this one has started, by whichever of its threads."""
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in children if b"tritium.runtime.ranks.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_processes_answer_as_one_does(engines: dict[str, Engine], shared: LLM) -> None:
    with LLM(engines["alone"].path, **LIMITS) as alone:
        expected = answers(alone)
    assert answers(shared) == expected
    assert len({token for tokens in expected for token in tokens}) > 20
    assert answers(shared) == expected  # now that prefixes are cached


LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


async def first_tokens(llm: LLM, count: int) -> list[int]:
    """The first tokens of a long output, which is left then."""
    found: list[int] = []
    stream = llm.generate_async(PROMPTS[1], LONG, request_id="left")
    async for part in stream:
        found += part.outputs[0].token_ids
        if len(found) >= count:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return found


def test_a_request_that_is_aborted_leaves_the_ranks_alike(shared: LLM) -> None:
    expected = answers(shared)
    tokens = asyncio.run(first_tokens(shared, 5))
    (whole,) = shared.generate([PROMPTS[1]], LONG, use_progress=False)
    assert whole.outputs[0].token_ids[: len(tokens)] == tokens
    assert answers(shared) == expected
    assert shared.stats.num_running == 0


def test_a_listener_that_fails_ends_its_request_and_no_other(shared: LLM) -> None:
    def fail(output: StepOutput) -> None:
        raise ArithmeticError("nobody hears this")

    heard: SimpleQueue[StepOutput] = SimpleQueue()
    expected = shared.generate([PROMPTS[3]], LONG, use_progress=False)[0].outputs[0].token_ids
    shared._thread.submit(Request("deaf", PROMPTS[1], LONG), fail, is_streaming=True)
    shared._thread.submit(Request("hears", PROMPTS[3], LONG), heard.put)
    assert list(heard.get(timeout=60).token_ids) == expected
    assert shared.stats.num_running == 0


def test_requests_that_are_too_much_for_one_message_go_in_several(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(shared)
    monkeypatch.setattr(loop, "TOKENS_A_MESSAGE", 20)
    assert answers(shared) == expected


def test_code_that_only_one_process_has_is_refused(shared: LLM) -> None:
    params = SamplingParams(max_tokens=2, logits_processors=[lambda prompt, output, row: None])
    with pytest.raises(RequestError, match=r"logits_processors are code of this process, .*: leave them out"):
        shared.generate([PROMPTS[0]], params, use_progress=False)


def test_what_numpy_computes_can_be_a_parameter(shared: LLM) -> None:
    given = [SamplingParams(temperature=kind(0.7), seed=5, max_tokens=4) for kind in (float, np.float64)]
    first, second = shared.generate([PROMPTS[0]] * 2, given, use_progress=False)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_a_single_rank_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank=1: LLM opens all ranks of a model; leave it out"):
        LLM(tmp_path / "never looked at", tensor_parallel=2, rank=1)


LOADED = """
import os, socket, sys
from tritium.runtime.ranks.messages import *
from tritium.wire import FrameBuffer, frame
connection = socket.socket(fileno=int(sys.argv[1]))
connection.sendall(frame(Loaded({model!r}, {{}})))
buffer, messages = FrameBuffer(), []
while len(messages) < 2:
    messages += buffer.feed(connection.recv(1 << 16))
"""


def opened_with(script: str, engine: Engine, **options: int) -> None:
    """Open a model whose other rank has loaded its part and is told where to meet, and then runs the script."""
    config = RuntimeConfig(**{**LIMITS, **options})
    open_loop(
        engine, config, None, command=(sys.executable, "-c", LOADED.format(model=describe_model(engine)) + script)
    ).close()


def test_a_rank_that_ends_where_the_others_wait_for_it_is_no_long_wait(engines: dict[str, Engine]) -> None:
    before = set(Path(tempfile.gettempdir()).glob("tritium-ranks-*"))
    with pytest.raises(EngineError, match="rank 1 of 2 ended with exit code 3"):
        opened_with("os._exit(3)", engines["shared"])
    assert set(Path(tempfile.gettempdir()).glob("tritium-ranks-*")) <= before


def test_what_the_first_rank_finds_too_is_its_own_error(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*args: Any, **kwargs: Any) -> None:
        raise OutOfMemory("the cache does not fit: give less")

    def explain(peers: Peers, error: Exception) -> None:
        raise AssertionError("nobody else is asked")

    monkeypatch.setattr(launch, "connect", lambda *_: GlooCommunicator(distributed.HashStore(), 0, 1))
    monkeypatch.setattr(launch, "make_loop", find)
    monkeypatch.setattr(Peers, "explain", explain)
    with pytest.raises(OutOfMemory, match=r"^the cache does not fit"):
        opened_with("while connection.recv(1 << 16): pass", engines["shared"])


@pytest.mark.full
def test_a_rank_that_has_stopped_does_not_keep_the_model_from_closing(engines: dict[str, Engine]) -> None:
    heard: SimpleQueue[StepOutput] = SimpleQueue()
    before = set(rank_processes())
    llm = LLM(engines["shared"].path.parent, **LIMITS)
    (process,) = set(rank_processes()) - before
    llm._thread.submit(Request("long", PROMPTS[0], LONG), heard.put, is_streaming=True)
    heard.get(timeout=60)
    os.kill(process, signal.SIGSTOP)
    llm.close()
    assert set(rank_processes()) == before


def test_every_rank_takes_new_weights_while_requests_run(shared: LLM, engines: dict[str, Engine]) -> None:
    place = engines["alone"].path.parent
    other = make_checkpoint(place / "other", MODEL, seed=5)
    with LLM(engines["alone"].path, **LIMITS) as alone:
        before, _, after = answers(alone), alone.update_weights(other), answers(alone)
    assert answers(shared) == before != after
    heard: SimpleQueue[StepOutput] = SimpleQueue()
    shared._thread.submit(Request("meanwhile", PROMPTS[1], LONG), heard.put, is_streaming=True)
    heard.get(timeout=60)
    assert shared.update_weights(other) == 1
    assert answers(shared) == after
    assert shared.update_weights(place / "model", on_inflight="finish_first") == 2
    assert answers(shared) == before
    with pytest.raises(
        EngineError, match=r"a state dict is in this process alone, .* give update_weights the directory"
    ):
        shared.update_weights(load_file(other / "model.safetensors"))


def scores(model: Path, num_ranks: int, scheme: str | None) -> torch.Tensor:
    """Log-probabilities of a prompt's tokens, by a model that is built when it is opened."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(model, tensor_parallel=num_ranks, scheme=scheme, **LIMITS) as llm:
        assert llm.engine.manifest.mapping.get("tensor_parallel", 1) == num_ranks
        (out,) = llm.generate([PROMPTS[2]], params, use_progress=False)
    return torch.tensor([token.logprob for token in out.prompt_logprobs or () if token is not None])


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g128"])
def test_ranks_round_weights_no_worse_than_one_process_does(scheme: str, engines: dict[str, Engine]) -> None:
    """A rank's parts of rows have scales of their own."""
    model = engines["alone"].path.parent / "model"
    exact = scores(model, 1, None)
    assert len(exact) == 39 and torch.allclose(scores(model, 2, None), exact, atol=1e-4)
    errors = [float((scores(model, num_ranks, scheme) - exact).abs().mean()) for num_ranks in (1, 2)]
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.full
def test_ranks_of_two_models_are_not_run_together(engines: dict[str, Engine], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(engines["shared"].path.parent, mixed)
    Engine.load(shutil.copytree(mixed / "rank-1", tmp_path / "other")).refit(engines["alone"].path.parent / "model")
    shutil.rmtree(mixed / "rank-1")
    (tmp_path / "other").rename(mixed / "rank-1")
    said = r"and rank 1's engine are of different models: .* generation 0; .* generation 1: refit or build all ranks"
    with pytest.raises(EngineError, match=said):
        LLM(mixed, **LIMITS)


def test_when_a_rank_is_lost_every_request_ends_with_the_reason_and_so_does_the_next(shared: LLM) -> None:
    """The last test: it ends the ranks that the others have used."""
    heard: SimpleQueue[StepOutput] = SimpleQueue()
    (process,) = rank_processes()

    def hear(output: StepOutput) -> None:
        if output.finish_reason is None:
            os.kill(process, signal.SIGKILL)  # in the middle of what the engine does
        else:
            heard.put(output)

    for index, prompt in enumerate(PROMPTS[:3]):
        shared._thread.submit(Request(f"r{index}", prompt, LONG), hear, is_streaming=True)
    ends = [heard.get(timeout=60) for _ in range(3)]
    reason = "rank 1 of 2 was ended by signal 9"
    assert [(end.finish_reason, end.error) for end in ends] == [("error", f"EngineError: {reason}")] * 3
    with pytest.raises(EngineError, match=f"{reason}; open the model again"):
        shared.generate([PROMPTS[0]], LONG, use_progress=False)
    shared.close()
    assert rank_processes() == []
