"""Tuning at the end of a build for a GPU, without one: over which blocks, and what is kept when it fails."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tritium import LLM
from tritium.cli.main import app
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError
from tritium.runtime.kernel_choice import choose_kernels
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_encoders import make_encoder
from tritium.tuner import tune as tuner
from tritium.tuner.timing_cache import TimingCache

HERE = {"hardware": "a GPU of compute capability 9.0", "driver": "1", "torch": "2", "triton": "3", "kernels": "4"}
HOW = {"max_model_len": 128, "device": "cuda", "tune": "quick"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that one can ask for but not run on, whose every step takes `gpu.seconds(count)`."""
    state = SimpleNamespace(seconds=lambda count: 1.0, block_sizes=[], batches=[])
    answers = {"is_available": True, "current_device": 0, "device_count": 1, "get_device_name": "A GPU"}
    for name, answer in (answers | {"get_device_capability": (9, 0)}).items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda answer=answer: answer)
    monkeypatch.setattr("tritium.runtime.gpu.device.find_spec", lambda name: name)
    monkeypatch.setattr("tritium.tuner.timing_cache.cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tuner, "gpu_environment", lambda: HERE)
    monkeypatch.setattr(tuner, "capability_for", lambda engine: (9, 0))

    @contextmanager
    def timing(engine, counts, num_threads, block_size):
        state.block_sizes.append(block_size)
        steps = choose_kernels(engine.plan, device="cuda")

        def times(count, tactics, repeats):
            state.batches.append(count)
            return [state.seconds(count) for _ in steps]

        yield times

    monkeypatch.setattr(tuner, "_timing", timing)
    return state


def model():
    return PlainLlama(size=256, head_size=64, num_layers=1).bfloat16()


def test_a_build_times_attention_over_the_blocks_asked_for_as_the_command_does(gpu, tmp_path):
    built = build(model(), output_dir=tmp_path / "e", **HOW, tune_block_size=64)
    assert gpu.block_sizes == [64]
    assert built.tactics.environment == {**HERE, "block_size": "64"} and built.tactics.num_measured > 0
    assert CliRunner().invoke(app, ["tune", str(built.path), "--block-size", "64"]).exit_code == 0
    assert gpu.block_sizes == [64]  # all of it is known
    assert Engine.load(built.path).tactics.environment == built.tactics.environment


@pytest.mark.parametrize(("given", "wanted"), [({"block_size": 64}, 64), ({}, None), ({"block_size": 16}, None)])
def test_what_is_built_to_be_run_is_timed_over_the_blocks_that_it_runs_over(given, wanted, gpu, monkeypatch):
    asked = []

    def obtain(model, config, *_, **__):
        asked.append(config)
        raise EngineError("that is enough")

    monkeypatch.setattr("tritium.llm.obtain_engine", obtain)
    for more in ({"tune": "quick"}, {}):
        with pytest.raises(EngineError, match="that is enough"):
            LLM("a model", device="cuda", **given, **more)
    tuned, plain = asked
    assert (tuned.tune_block_size, plain.tune_block_size) == (wanted, None)


def test_a_block_size_that_a_build_cannot_use_is_refused_with_what_to_do(gpu, tmp_path):
    result = CliRunner().invoke(app, ["build", "no such model", "--output", str(tmp_path / "e"), "--block-size", "64"])
    assert result.exit_code != 0
    assert result.stderr.splitlines()[-1].endswith(
        "tune_block_size=64 (--block-size) is for tune with device='cuda', not for tune='none' with device='cpu': "
        "leave it out"
    )
    with pytest.raises(ConfigError, match="tune_block_size must be a power of two, not 48"):
        BuildConfig(device="cuda", tune="quick", tune_block_size=48)
    encoder, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    with pytest.raises(ConfigError, match="tune_block_size=64: an encoder has no KV cache; leave it out"):
        build(encoder, output_dir=tmp_path / "e", device="cuda", tune="quick", tune_block_size=64)
    assert not (tmp_path / "e").exists()


def test_an_engine_whose_tuning_fails_is_kept_untuned_and_tuning_goes_on_from_the_times_that_are_known(gpu, tmp_path):
    def seconds(count):
        if count == 64:
            raise RuntimeError("an illegal memory access was encountered")
        return 1.0

    gpu.seconds, place = seconds, tmp_path / "e"
    with pytest.raises(EngineError) as raised:
        build(model(), output_dir=place, **HOW, tune_block_size=64)
    said = str(raised.value)
    assert said.startswith(f"{place} is built, and tuning it failed (KernelError: the engine's defaults cannot run a")
    assert "batch of 64 tokens (RuntimeError: an illegal memory access was encountered)" in said
    again = f"tritium tune {place} --effort quick --block-size 64"
    assert said.endswith(f"it runs by defaults; `{again}` goes on from the times that are known")
    kept = Engine.load(place, verify=True)
    assert kept.tactics is None and kept.manifest.build["tune"] == "quick"
    gpu.seconds = lambda count: 1.0
    gpu.batches.clear()
    assert CliRunner().invoke(app, again.split()[1:]).exit_code == 0
    tuned = Engine.load(place).tactics
    assert set(gpu.batches) == {64, 256} and tuned.num_measured > 0 and tuned.num_cached > 0


def test_a_cache_of_times_that_is_damaged_takes_no_engine_away(gpu, tmp_path):
    TimingCache(HERE).path.write_text("{")
    with pytest.raises(EngineError, match=r"is built, and tuning it failed \(ConfigError: .* is no file of timings"):
        build(model(), output_dir=tmp_path / "e", **HOW)
    assert Engine.load(tmp_path / "e", verify=True).tactics is None
