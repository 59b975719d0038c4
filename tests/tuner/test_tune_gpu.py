"""Tuning an engine for a GPU, as far as no GPU is needed: its sites, what is chosen, and where the choice counts."""

import math
import shutil
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import msgspec
import pytest
from typer.testing import CliRunner

from tritium.cli.main import app
from tritium.compiled import compile_module
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import differences, over_blocks
from tritium.engine.plan import Sizes
from tritium.errors import EngineError
from tritium.quantizer import quantize
from tritium.runtime.binding import bind_tuned
from tritium.runtime.kernel_choice import choose_kernels, usable_tactics
from tritium.testing.plain_models import PlainLlama
from tritium.tuner import tune as tuner
from tritium.tuner.sites import sites, time_key
from tritium.tuner.timing_cache import TimingCache

HERE = {"hardware": "a GPU of compute capability 9.0", "driver": "1", "torch": "2", "triton": "3", "kernels": "4"}


@cache
def plan_of(scheme, **options):
    model = PlainLlama(size=256, head_size=64, num_layers=1).bfloat16()
    return compile_module(model, BuildConfig(scheme=scheme, device="cuda", **options)).plan


def names(plan, **limits):
    found = sites(plan, (), "cuda", is_thorough=True, **limits)
    return {site.op: [c.name for c in site.candidates] for site in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    model = PlainLlama(size=256, head_size=64, num_layers=1).bfloat16()
    path = tmp_path_factory.mktemp("engine") / "e"
    return build(model, output_dir=path, max_model_len=128, device="cuda", scheme="fp8").path


@pytest.fixture
def engine(built, tmp_path):
    return Engine.load(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def timings(tmp_path):
    return TimingCache(HERE, tmp_path / "timings.json")


@pytest.fixture
def measured(monkeypatch):
    """Times as a GPU would give them: `measured.seconds(kernel name, tactic, count)`, 1 until a test says otherwise."""
    state = SimpleNamespace(seconds=lambda kernel, tactic, count: 1.0, batches=[], block_sizes=[])

    @contextmanager
    def timing(engine, counts, num_threads, block_size):
        state.block_sizes.append(block_size)
        plain = [kernel.name for kernel in choose_kernels(engine.plan, device="cuda")]

        def times(count, tactics, repeats):
            state.batches.append(count)
            kernels = [tactics.kernels.get(index, name) for index, name in enumerate(plain)]
            return [state.seconds(k, tactics.tactic(i, k, count), count) for i, k in enumerate(kernels)]

        yield times

    monkeypatch.setattr(tuner, "_timing", timing)
    monkeypatch.setattr(tuner, "capability_for", lambda engine: (9, 0))
    return state


def test_an_fp8_plan_has_blocks_splits_and_torchs_attention_to_choose_among_and_never_an_eager_row():
    found = names(plan_of("fp8"))
    assert found["paged_attention"] == [
        "gpu.paged_attention", "gpu.paged_attention:blocks=4", "gpu.paged_attention:blocks=6",
        "gpu.paged_attention:split_below=0", "gpu.paged_attention:split_below=132",
        "gpu.paged_attention:split_below=528", "gpu.paged_attention_fixed", "gpu.paged_attention_varlen",
    ]  # fmt: skip
    assert found["linear_fp8"] == [
        "gpu.linear_fp8", "gpu.linear_fp8:by=triton", "gpu.linear_fp8:by=cublas", "gpu.linear_fp8_fixed"
    ]  # fmt: skip
    assert found["linear"] == ["gpu.linear", "gpu.linear:by=triton", "gpu.linear_fixed"]
    assert "rms_norm_fp8" not in found


def test_a_cache_of_a_byte_a_number_has_blocks_to_choose_and_one_of_two_has_not():
    blocks = {"gpu.paged_attention:blocks=4", "gpu.paged_attention:blocks=6"}
    of_int8, of_bf16 = (set(names(plan_of(None, kv_dtype=kept))["paged_attention"]) for kept in ("int8", "auto"))
    assert of_int8 - of_bf16 == blocks and "gpu.paged_attention_varlen" in of_int8 & of_bf16


def test_an_older_gpu_is_not_offered_what_it_cannot_run():
    plan = plan_of("fp8")
    assert "gpu.paged_attention_varlen" in names(plan, capability=(8, 0))["paged_attention"]
    assert "gpu.paged_attention_varlen" not in names(plan, capability=(7, 5))["paged_attention"]


@pytest.mark.parametrize("scheme", ["fp8", "w4a16_g128", "w8a8"])
def test_where_bits_must_not_depend_on_the_batch_only_exact_sums_have_tiles_to_choose(scheme):
    found = names(plan_of(scheme), is_bitwise=True)
    assert set(found) == ({"linear_int8"} if scheme == "w8a8" else set())
    assert all(name.startswith("gpu.linear_int8") for name in found.get("linear_int8", []))


def test_quantised_linears_have_tiles_to_choose_what_sizes_decide_first():
    candidates = names(plan_of("w4a16_g128"))["quantized_linear"]
    assert candidates[0] == "gpu.quantized_linear" and candidates[-1] == "gpu.quantized_linear_fixed"
    assert "gpu.quantized_linear:BLOCK_N=64:BLOCK_M=16:SPLITS=8:num_warps=4:num_stages=6" in candidates


def test_the_default_stays_where_nothing_is_faster_by_more_than_measurements_differ(engine, timings, measured):
    measured.seconds = lambda kernel, tactic, count: 0.98 if tactic or kernel.endswith(("_fixed", "_varlen")) else 1.0
    tactics = tuner.tune(engine, "quick", timings)
    assert measured.batches and set(measured.batches) == {1, 16, 64, 256}  # it has no prompt of 2,048 tokens
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert (attention.kernel, attention.tactics) == ("gpu.paged_attention", ())


def test_each_size_gets_its_fastest_tactic_and_a_second_tuning_measures_nothing(engine, timings, measured):
    best = {1: {"split_below": 528}, 16: {"blocks": 4}, 64: {"blocks": 6}, 256: {"blocks": 6}}
    measured.seconds = lambda kernel, tactic, count: 0.5 if tactic == best[count] else 1.0
    tactics = tuner.tune(engine, "quick", timings)
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert attention.kernel == "gpu.paged_attention"
    assert attention.tactics == tuple(best.items())
    measured.batches.clear()
    again = tuner.tune(engine, "quick", TimingCache(HERE, timings.path))
    assert again.choices == tactics.choices and (again.num_measured, measured.batches) == (0, [])


def test_another_kernel_is_chosen_when_it_is_slower_at_no_size(engine, timings, measured):
    slow = {"gpu.paged_attention_fixed": 256, "gpu.paged_attention_varlen": None}

    def seconds(kernel, tactic, count):
        return 1.0 if kernel not in slow else 1.1 if count == slow[kernel] else 0.2 if slow[kernel] else 0.5

    measured.seconds = seconds
    tactics = tuner.tune(engine, "quick", timings)
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert attention.kernel == "gpu.paged_attention_varlen"


def test_a_kernel_that_is_as_fast_at_most_sizes_and_faster_at_some_is_chosen(engine, timings, measured):
    def seconds(kernel, tactic, count):
        return 0.8 if kernel.endswith("_varlen") and count == 64 else 1.02 if kernel.endswith("_varlen") else 1.0

    measured.seconds = seconds
    tactics = tuner.tune(engine, "quick", timings)
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert attention.kernel == "gpu.paged_attention_varlen"


def test_what_wants_more_than_the_gpu_has_is_noted_not_chosen_and_not_tried_again(engine, timings, measured):
    measured.seconds = lambda kernel, tactic, count: math.inf if tactic == {"blocks": 6} else 1.0
    tactics = tuner.tune(engine, "quick", timings)
    [site] = [s for s in sites(engine.plan, (), "cuda", is_thorough=False) if s.op == "paged_attention"]
    known = {c.name for c in site.candidates if timings.get(time_key(site, 1, c)) == 1.0}
    assert known == {c.name for c in site.candidates} - {"gpu.paged_attention:blocks=6"}
    assert all({"blocks": 6} not in dict(choice.tactics).values() for choice in tactics.choices)
    measured.batches.clear()
    again = tuner.tune(engine, "quick", TimingCache(HERE, timings.path))
    assert (again.num_measured, again.num_cached, measured.batches) == (0, tactics.num_measured, [])
    assert again.choices == tactics.choices


def test_the_chosen_tactic_of_a_size_reaches_the_kernel(engine, timings, measured):
    measured.seconds = lambda kernel, tactic, count: 0.5 if tactic == {"blocks": 6} and count > 16 else 1.0
    tactics = tuner.tune(engine, "quick", timings)
    kernels = choose_kernels(engine.plan, device="cuda", tuned=tactics.kernels)
    index = next(i for i, step in enumerate(engine.plan.steps) if step.op == "paged_attention")
    binder = SimpleNamespace(bind=lambda step, kernel, sizes, tactic: (step.op, kernel.name, tactic))
    bound = [
        bind_tuned(engine.plan, kernels, tactics, binder, index, Sizes(tokens=tokens, sequences=1, rows=1))
        for tokens in (1, 16, 17, 64, 4096)
    ]
    assert [tactic for *_, tactic in bound] == [{}, {}, {"blocks": 6}, {"blocks": 6}, {"blocks": 6}]
    assert {pair[:2] for pair in bound} == {("paged_attention", "gpu.paged_attention")}


def test_a_choice_counts_on_the_gpu_it_was_measured_on_and_elsewhere_that_is_said(engine, timings, measured, caplog):
    tuned = tuner.tune_engine(engine, "quick", timings)
    assert usable_tactics(tuned, HERE) == tuned.tactics
    assert not caplog.text
    assert usable_tactics(tuned, HERE | {"driver": "2"}) is None
    assert f"{engine.path} was tuned elsewhere (driver was '1', is '2'): defaults are used" in caplog.text
    assert f"`tritium tune {engine.path}` measures here" in caplog.text


def test_a_tactic_that_a_kernel_does_not_have_is_refused(engine, timings, measured, caplog):
    measured.seconds = lambda kernel, tactic, count: 0.5 if tactic == {"blocks": 6} else 1.0
    tuned = tuner.tune_engine(engine, "quick", timings)
    assert usable_tactics(tuned, HERE) is not None
    text = msgspec.json.encode(tuned.tactics).replace(b'"blocks":6', b'"blocks":5')
    other = msgspec.json.decode(text, type=type(tuned.tactics))
    spoilt = SimpleNamespace(tactics=other, plan=tuned.plan, path=tuned.path, plugins=())
    assert usable_tactics(spoilt, HERE) is None
    assert "gpu.paged_attention with blocks=5: gpu.paged_attention has no such tactic" in caplog.text


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that one can ask for but not run on; its compute capability can be changed."""
    state = SimpleNamespace(capability=(9, 0))
    answers = {"is_available": True, "current_device": 0, "get_device_name": "A GPU"}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda answer=answer: answer)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: state.capability)
    monkeypatch.setattr("tritium.runtime.gpu.device.find_spec", lambda name: name)
    monkeypatch.setattr(tuner, "gpu_environment", lambda: HERE)
    return state


def test_a_build_that_is_asked_to_tunes_as_the_command_does_and_measures_nothing_twice(
    engine, timings, measured, gpu, tmp_path, monkeypatch
):
    monkeypatch.setattr("tritium.tuner.timing_cache.cache_dir", lambda: timings.path.parent)
    measured.seconds = lambda kernel, tactic, count: 0.5 if tactic == {"blocks": 6} else 1.0
    by_command = tuner.tune_engine(engine, "quick", timings).tactics
    measured.batches.clear()
    model = PlainLlama(size=256, head_size=64, num_layers=1).bfloat16()
    said = []
    built = build(
        model, output_dir=tmp_path / "tuned", max_model_len=128, device="cuda", scheme="fp8", tune="quick",
        progress=lambda *call: said.append(call),
    )  # fmt: skip
    assert built.path == tmp_path / "tuned" and Engine.load(built.path, verify=True).tactics == built.tactics
    assert built.tactics.choices == by_command.choices and built.tactics.environment == HERE
    assert (built.tactics.num_measured, measured.batches) == (0, [])
    assert said[-1] == ("tune", 1, 1)


def test_times_are_taken_in_blocks_of_the_size_asked_for_kept_apart_and_count_whatever_runs(
    engine, measured, gpu, tmp_path, monkeypatch
):
    monkeypatch.setattr("tritium.tuner.timing_cache.cache_dir", lambda: tmp_path)
    for flags in (["--block-size", "64"], [], ["--block-size", "64"]):
        result = CliRunner().invoke(app, ["tune", str(engine.path), *flags], catch_exceptions=False)
        assert result.exit_code == 0
    assert measured.block_sizes == [64, 16]
    tactics = Engine.load(engine.path).tactics
    assert tactics.environment == {**HERE, "block_size": "64"} and differences(tactics.environment, HERE) == ""


def test_to_ask_for_blocks_of_the_default_size_is_to_ask_for_nothing(engine, gpu):
    assert tuner.environment_of(engine, block_size=16) == tuner.environment_of(engine) == HERE


@pytest.mark.parametrize(("tuned_for", "runs_with"), [(64, 16), (16, 64), (64, 32)])
def test_over_blocks_of_another_size_attention_runs_by_defaults_and_that_is_said_once(
    tuned_for, runs_with, engine, measured, tmp_path, caplog
):
    timings = TimingCache(over_blocks(HERE, tuned_for), tmp_path / "t.json")
    measured.seconds = lambda kernel, tactic, count: 0.5 if tactic in ({"blocks": 6}, {"by": "triton"}) else 1.0
    tuned = tuner.tune_engine(engine, "quick", timings)
    assert usable_tactics(tuned, HERE, block_size=tuned_for) == tuned.tactics and not caplog.text
    found = usable_tactics(tuned, HERE, block_size=runs_with)
    ops = {
        op: next(i for i, step in enumerate(tuned.plan.steps) if step.op == op) for op in ("paged_attention", "linear")
    }
    assert tuned.tactics.tactic(ops["paged_attention"], "gpu.paged_attention", 16) == {"blocks": 6}
    assert found.tactic(ops["paged_attention"], "gpu.paged_attention", 16) == {}
    assert found.tactic(ops["linear"], "gpu.linear", 16) == {"by": "triton"}
    [said] = caplog.messages
    for part in (
        f"{engine.path} was tuned for block_size={tuned_for} and runs with block_size={runs_with}: its attention",
        f"open it with block_size={tuned_for} (--block-size), or `tritium tune {engine.path} --block-size {runs_with}`",
    ):
        assert part in said


def test_a_block_size_that_nothing_has_is_refused_with_what_to_do(engine, gpu, tmp_path):
    def said(path, size):
        result = CliRunner().invoke(app, ["tune", *([str(path)] if path else []), "--block-size", size])
        assert result.exit_code != 0
        return result.stderr.splitlines()[-1]

    assert "block_size must be a power of two, not 48" in said(engine.path, "48")
    assert "from 1 to 256" in said(engine.path, "512") and "512" in said(engine.path, "512")
    for_cpu = build(PlainLlama(size=256, head_size=64, num_layers=1), output_dir=tmp_path / "c", max_model_len=64)
    assert "block_size=64 is for decoders on a GPU" in said(for_cpu.path, "64")
    assert said(for_cpu.path, "64").endswith("is an engine of kind 'decoder' for 'cpu': leave it out")
    export = CliRunner().invoke(app, ["tune", "--export", str(tmp_path / "t"), "--block-size", "64"])
    assert "--block-size 64 says how an engine is timed: name an engine to tune" in export.stderr


def test_a_gpu_that_is_too_old_for_a_kernel_is_told_before_weights_are_written(gpu, tmp_path):
    gpu.capability, said = (8, 0), []
    model = PlainLlama(size=256, head_size=64, num_layers=1).bfloat16()
    how = {"output_dir": tmp_path / "e", "max_model_len": 128, "device": "cuda", "scheme": "fp8"}
    with pytest.raises(EngineError, match=r"gpu\..*_fp8 needs compute capability .*, and A GPU has 8\.0: .* w8a8"):
        build(model, **how, tune="quick", progress=lambda stage, *_: said.append(stage))
    assert "write" not in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("act", [build, quantize])
def test_a_build_that_cannot_be_tuned_is_refused_before_anything_is_read(act, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError) as raised:
        act("no such model", output_dir=tmp_path / "e", scheme="fp8", device="cuda", tune="full")
    said = str(raised.value)
    assert "tune='full' with device='cuda'" in said and "finds no GPU here" in said
    assert said.endswith("build without tune, then run `tritium tune ENGINE --effort full` where that GPU is")
    command = ["build", "no such model", "--output", str(tmp_path / "e"), "--device", "cuda", "--tune", "quick"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "tritium tune ENGINE --effort quick" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "e").exists()


def test_without_a_gpu_tuning_is_one_clear_error_and_nothing_is_written(engine, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for effort in ("none", "quick"):
        result = CliRunner().invoke(app, ["tune", str(engine.path), "--effort", effort])
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 1 and "was built for an NVIDIA GPU, and torch" in line and "--device cpu" in line
    assert not (engine.path / "tactics.json").exists()
