"""Tuning a tiny engine: what is measured, what is chosen, and that nothing changes but time."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tritium import LLM, SamplingParams
from tritium.cli.main import app
from tritium.compiler import build
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.engine.environment import differences, environment
from tritium.errors import ConfigError, EngineError
from tritium.runtime.encoder_request import EncoderRequest
from tritium.runtime.encoder_runner import EncoderRunner
from tritium.runtime.step_times import StepTimer
from tritium.testing.plain_models import PlainLlama
from tritium.testing.tiny_encoders import make_encoder
from tritium.tuner import tune as tuner
from tritium.tuner.sites import sites, time_key
from tritium.tuner.timing_cache import TimingCache

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[3, 5, 7], list(range(20)), [9] * 11]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(PlainLlama(num_layers=2), output_dir=tmp_path_factory.mktemp("engine") / "e", max_model_len=128).path


@pytest.fixture
def engine(built, tmp_path):
    return Engine.load(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """One of the test's own; commands use it as the user's."""
    monkeypatch.setattr("tritium.tuner.timing_cache.cache_dir", lambda: tmp_path)
    return TimingCache(environment(1), tmp_path / "timings.json")


@pytest.fixture
def few(monkeypatch):
    """Two sizes of batch, one repetition."""
    monkeypatch.setattr(tuner, "COUNTS", {"quick": (1, 16), "full": (1, 16)})
    monkeypatch.setattr(tuner, "REPEATS", {"quick": 1, "full": 1})


def known_times(engine, cache, seconds):
    """Fill the cache with made-up times: `seconds(site, count, candidate)`."""
    for site in sites(engine.plan, engine.plugins, is_thorough=True):
        for count in (1, 16):
            for candidate in site.candidates:
                cache.put(time_key(site, count, candidate), seconds(site, count, candidate))


def test_layers_of_equal_sizes_are_one_site_and_attention_has_its_tactics(engine):
    found = {site.op: site for site in sites(engine.plan, (), is_thorough=False)}
    attention = found["paged_attention"]
    assert len(attention.steps) == 2
    assert [c.tactic["item_rows"] for c in attention.candidates] == [64, 16, 32, 128]
    assert [c.name for c in found["linear_gated"].candidates[:2]] == [
        "cpu.linear_gated:share=auto:block_rows=0", "cpu.linear_gated:share=rows:block_rows=0"
    ]  # fmt: skip
    thorough = {site.op: site for site in sites(engine.plan, (), is_thorough=True)}
    assert {c.kernel.name for c in thorough["rms_norm"].candidates} == {"cpu.rms_norm", "eager.rms_norm"}
    assert "rms_norm" not in found


def test_a_second_tuning_measures_nothing(engine, cache, few):
    said = []
    tactics = tuner.tune(engine, "quick", cache, num_threads=1, progress=lambda *call: said.append(call))
    assert tactics.num_measured >= 8 and tactics.num_cached == 0
    assert said[0][:2] == (0, said[-1][1]) and said[-1][0] == said[-1][1] and said[-1][2] == 0
    again = tuner.tune(engine, "quick", TimingCache(environment(1), cache.path), num_threads=1)
    assert (again.num_measured, again.num_cached) == (0, tactics.num_measured)
    assert again.choices == tactics.choices
    assert all(0 < seconds < 10 for choice in tactics.choices for seconds in choice.seconds.values())


def test_effort_none_measures_nothing_and_knows_nothing(engine, cache):
    tactics = tuner.tune(engine, "none", cache, num_threads=1)
    assert (tactics.choices, tactics.num_measured) == ((), 0)
    with pytest.raises(ConfigError, match="effort must be one of none, quick, full, not 'much'"):
        tuner.tune(engine, "much", cache)


def test_each_batch_size_gets_its_fastest_tactic_and_the_site_one_kernel(engine, cache, few):
    """eager is faster for 1 token, the compiled one in both together: the site's numbers are of one class."""
    best = {1: 128, 16: 16}

    def seconds(site, count, candidate):
        if candidate.kernel.backend == "eager":
            return {1: 0.5, 16: 9.0}[count]
        return 1.0 if candidate.tactic.get("item_rows") == best[count] else 2.0

    known_times(engine, cache, seconds)
    tactics = tuner.tune(engine, "full", cache, num_threads=1)
    assert tactics.num_measured == 0
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert attention.kernel == "cpu.paged_attention"
    assert attention.tactics == ((1, {"item_rows": 128}), (16, {"item_rows": 16}))
    assert [tactics.tactic(attention.steps[1], attention.kernel, n) for n in (1, 2, 16, 17)] == [
        {"item_rows": 128}, {"item_rows": 16}, {"item_rows": 16}, {"item_rows": 16},
    ]  # fmt: skip
    assert tactics.tactic(attention.steps[0], "another.kernel", 1) == {}


def test_what_is_denied_is_never_chosen_and_denying_everything_is_refused(engine, cache, few):
    known_times(engine, cache, lambda site, count, c: 1.0 if "item_rows=128" in c.name else 2.0)
    cache.deny(["cpu.paged_attention:item_rows=128"])
    tactics = tuner.tune(engine, "full", cache, denied=["eager.paged_attention"], num_threads=1)
    [attention] = [c for c in tactics.choices if "paged_attention" in c.site]
    assert {t["item_rows"] for _, t in attention.tactics} != {128}
    with pytest.raises(
        ConfigError, match=r"every kernel that can run rms_norm is denied: cpu\.rms_norm, eager\.rms_norm"
    ):
        tuner.tune(engine, "full", cache, denied=["cpu.rms_norm", "eager.rms_norm"])


def test_tuned_engines_answer_with_the_same_bits_and_say_what_was_chosen(engine, cache, few):
    with LLM(engine.path, **LIMITS) as llm:
        plain = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    plan = (engine.path / "plan.json").read_bytes()
    done = CliRunner().invoke(app, ["tune", str(engine.path), "--num-threads", "1", "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["num_measured"] > 0 and report["num_cached"] == 0
    tuned = Engine.load(engine.path, verify=True)
    assert (engine.path / "plan.json").read_bytes() == plan and tuned.tactics.effort == "quick"
    again = CliRunner().invoke(app, ["tune", str(engine.path), "--num-threads", "1"], catch_exceptions=False)
    assert "0 times measured" in again.stderr and "paged_attention x 2: cpu.paged_attention up to" in again.stderr
    with LLM(engine.path, **LIMITS) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] == plain


def test_an_encoder_is_tuned_and_gives_the_same_bits(tmp_path, cache, few):
    path, _ = make_encoder(tmp_path / "model", "BertForSequenceClassification")
    engine = build(path, output_dir=tmp_path / "bert")
    request = EncoderRequest(token_ids=list(range(5, 25)), token_types=[0] * 20, task="classify")
    [plain] = EncoderRunner(engine, RuntimeConfig(num_threads=1)).compute([request])
    known_times(engine, cache, lambda site, count, c: 1.0 if "share=panels" in c.name else 2.0)
    tactics = tuner.tune(engine, "quick", cache, num_threads=1)
    assert tactics.num_measured == 0  # of its one row at 1 alone
    tuned = tuner.tune_engine(engine, "quick", cache, num_threads=1)
    assert {t["share"] for c in tuned.tactics.choices for _, t in c.tactics if "linear" in c.kernel} == {"panels"}
    assert torch.equal(EncoderRunner(tuned, RuntimeConfig(num_threads=1)).compute([request])[0], plain)
    assert tuner.tune(engine, "quick", TimingCache(environment(1), tmp_path / "empty.json")).num_measured > 10


def test_times_of_another_machine_are_not_used_and_that_is_said(engine, cache, few, caplog, monkeypatch):
    known_times(engine, cache, lambda *_: 1.0)
    other = TimingCache(cache.environment | {"hardware": "a toaster"}, cache.path)
    known_times(engine, other, lambda *_: 1.0)
    tuner.tune_engine(engine, "none", other)
    with LLM(engine.path, **LIMITS) as llm:
        llm.generate(PROMPTS[:1], GREEDY)
    assert "was tuned elsewhere (hardware was 'a toaster', is " in caplog.text
    assert f"`tritium tune {engine.path}` measures here" in caplog.text
    assert differences(cache.environment, environment(1)) == ""
    monkeypatch.setenv("TRITIUM_CPU_LEVEL", "avx2")
    assert differences(cache.environment, environment(1)).endswith(" as avx2'")


def test_a_damaged_tactics_file_is_named(engine, cache, few):
    known_times(engine, cache, lambda *_: 1.0)
    tuner.tune_engine(engine, "none", cache)
    loaded = Engine.load(engine.path)
    (engine.path / "tactics.json").write_text('{"version": 9, "environment": {}, "effort": "x"}')
    with pytest.raises(EngineError, match=r"tactics\.json has version 9, this Tritium reads 1: tune the engine again"):
        _ = loaded.tactics


def test_every_step_of_a_batch_is_timed(engine):
    timer = StepTimer(engine, num_threads=1)
    for times in (timer.prefill(20, 1), timer.decode(3, 10, 1)):
        assert len(times) == len(engine.plan.steps) and min(times) > 0
    with pytest.raises(ConfigError, match="the number of tokens must be an integer from 1 to 126, not 500"):
        timer.prefill(500)


def test_a_second_build_finds_every_time_in_the_cache(tmp_path, cache, few):
    """One build from nothing, one with a warm cache; both give the same engine."""
    first, second = (
        build(PlainLlama(num_layers=1), output_dir=tmp_path / name, max_model_len=64, tune="quick")
        for name in ("first", "second")
    )
    assert first.tactics.num_measured > 0 and first.tactics.num_cached == 0
    assert second.tactics.num_measured == 0 and second.tactics.num_cached == first.tactics.num_measured
    assert second.tactics.choices == first.tactics.choices
    assert second.manifest.files["plan.json"] == first.manifest.files["plan.json"]


def test_an_engine_for_a_gpu_is_refused_and_nothing_is_written(tmp_path, cache):
    model = PlainLlama(size=128, num_heads=4)
    engine = build(model, output_dir=tmp_path / "e", max_model_len=128, device="cuda")
    result = CliRunner().invoke(app, ["tune", str(engine.path)])
    assert result.exit_code != 0 and not (engine.path / "tactics.json").exists()
    said = " ".join(result.output.split())
    assert "built for an NVIDIA GPU" in said and "--device cpu" in said
