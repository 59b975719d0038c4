"""A GPU whose memory is limited: one error with the numbers, and an engine that goes on. Needs a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tritium import LLM, SamplingParams, build, models
from tritium.config import RuntimeConfig
from tritium.errors import OutOfMemory
from tritium.runtime.assemble import make_executor, make_scheduler
from tritium.runtime.outputs import StepOutput
from tritium.runtime.overlap_loop import OverlapLoop
from tritium.runtime.request import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture
def limited() -> Iterator[None]:
    """96 MiB for all of this process's tensors, whatever the driver says is free."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_that_finds_no_room_is_one_error_with_the_numbers(
    limited: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path))
    wanted = r"loading the model ran out of memory on .* are free; the engine takes weights .*, KV cache 2\.0"
    with pytest.raises(OutOfMemory, match=wanted):
        LLM(DEMO, device="cuda", kv_cache_memory=2 * 10**9, max_num_seqs=4096, max_num_batched_tokens=4096)


def test_a_step_that_finds_no_room_ends_its_requests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(DEMO, output_dir=tmp_path / "engine", device="cuda")
    config = RuntimeConfig(max_num_seqs=4, kv_cache_memory=50_000_000)
    executor = make_executor(engine, config)
    loop = OverlapLoop(make_scheduler(engine, config, executor), executor)  # type: ignore[arg-type]
    run = executor._run  # type: ignore[union-attr]

    def full(**_: int) -> None:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")

    def ask(name: str) -> StepOutput:
        outputs: list[StepOutput] = []
        loop.submit(Request(name, [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)), outputs.append)
        while loop.has_work:
            loop.step()
        return outputs[-1]

    monkeypatch.setattr(executor, "_run", full)
    failed = ask("first")
    assert failed.finish_reason == "error" and "running a step ran out of memory on" in str(failed.error)
    monkeypatch.setattr(executor, "_run", run)
    assert ask("second").finish_reason == "length"


def test_what_is_predicted_is_what_is_allocated_within_two_per_cent(tmp_path: Path) -> None:
    model = models.preset("llama-3.2-1b", dtype="bfloat16", max_model_len=2048)
    engine = build(model, output_dir=tmp_path / "engine", weights="dummy", device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executor = make_executor(engine, RuntimeConfig(max_num_seqs=256, max_num_batched_tokens=2048, block_size=64))
    predicted = executor.footprint.total_bytes  # type: ignore[union-attr]
    torch.cuda.synchronize()
    assert abs(torch.cuda.max_memory_allocated() - before - predicted) <= 0.02 * predicted


def test_a_closed_llm_gives_the_gpu_its_memory_back_while_somebody_still_has_it(
    tmp_path: Path,
) -> None:
    engine = build(DEMO, output_dir=tmp_path / "engine", device="cuda").path
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    limits = {"max_num_seqs": 4, "kv_cache_memory": 1 << 30}
    first = LLM(engine, **limits)  # libraries' own memory stays
    first.generate(["a"] * 3, params)
    first.close()
    before = torch.cuda.memory_reserved()
    second = LLM(engine, **limits)
    second.generate(["a"] * 3, params)
    assert torch.cuda.memory_reserved() - before > 32 << 20
    second.close()
    assert torch.cuda.memory_reserved() <= before
