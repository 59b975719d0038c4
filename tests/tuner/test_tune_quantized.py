"""Tuning an engine of quantised linears: which paths are offered, one for each size of batch, and equal bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.engine.environment import environment
from tritium.engine.tactics import Tactics
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Tactic
from tritium.testing.plain_models import PlainLlama
from tritium.tuner import tune as tuner
from tritium.tuner.sites import Candidate, Site, sites, time_key
from tritium.tuner.timing_cache import TimingCache

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_threads": 1}
LOGITS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5, prompt_logprobs=5)
PROMPTS = [[3, 5, 7], list(range(50)), [9] * 11]
PATHS = {"tiles": 3, "vectors": 16, "groups": 64}  # by the largest batch of each


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = PlainLlama(size=128, num_layers=2).bfloat16()
    folder = tmp_path_factory.mktemp("engine") / "e"
    return build(model, output_dir=folder, max_model_len=128, scheme="w4a8_g128").path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Engine:
    return Engine.load(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TimingCache:
    monkeypatch.setattr(tuner, "COUNTS", dict.fromkeys(("quick", "full"), tuple(PATHS.values())))
    return TimingCache(environment(1), tmp_path / "timings.json")


def quantised(engine: Engine) -> list[Site]:
    return [site for site in sites(engine.plan, (), is_thorough=False) if site.op.startswith("quantized_linear")]


def with_times(engine: Engine, cache: TimingCache, seconds: Callable[[int, Candidate], float]) -> Engine:
    """Tuned by made-up times."""
    for site in sites(engine.plan, (), is_thorough=False):
        for count in PATHS.values():
            for candidate in site.candidates:
                cache.put(time_key(site, count, candidate), seconds(count, candidate))
    return tuner.tune_engine(engine, "quick", cache, num_threads=1)


def answers(engine: Engine) -> list[object]:
    """Tokens and their log-probabilities, of prompts too."""
    with LLM(engine.path, **LIMITS) as llm:
        return [
            (o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in llm.generate(PROMPTS, LOGITS)
        ]


def test_paths_are_offered_where_there_are_tiles_and_keep_every_bit_of_the_logits(
    engine: Engine, cache: TimingCache
) -> None:
    found = {site.op: {c.tactic["path"] for c in site.candidates} for site in quantised(engine)}
    if not library.has_tiles():
        assert found == {}
        return
    assert set(found) == {"quantized_linear", "quantized_linear_gated"}
    assert set().union(*found.values()) == {"auto", "vectors", "tiles", "groups"}
    plain = answers(engine)
    fastest = {count: path for path, count in PATHS.items()}
    tuned = with_times(engine, cache, lambda count, c: 1.0 if c.tactic.get("path") == fastest[count] else 2.0)
    assert tuned.tactics is not None
    of_gated = next(c for c in tuned.tactics.choices if "quantized_linear_gated" in c.site)
    assert [(count, tactic["path"]) for count, tactic in of_gated.tactics] == [(n, path) for path, n in PATHS.items()]
    assert answers(tuned) == plain


@pytest.mark.parametrize(
    ("tactic", "reason"),
    [
        ({"path": "sideways"}, "path='sideways': cpu.quantized_linear_gated has no such tactic"),
        ({"path": "tiles"}, "path='tiles': there are no AMX tiles in this process"),
    ],
)
def test_a_tactic_that_cannot_run_here_is_named_and_the_defaults_are_used(
    engine: Engine,
    cache: TimingCache,
    tactic: Tactic,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the kernel does not grant tiles to a CPU that has them."""
    monkeypatch.setattr(library, "has_tiles", lambda: False)
    plain = answers(engine)
    step = next(i for i, step in enumerate(engine.plan.steps) if step.op == "quantized_linear_gated")
    choice = {"site": "", "steps": [step], "kernel": "cpu.quantized_linear_gated", "tactics": [[64, tactic]]}
    named = msgspec.convert({"environment": cache.environment, "effort": "quick", "choices": [choice]}, Tactics)
    monkeypatch.setattr(tuner, "tune", lambda *_, **__: named)
    tuned = tuner.tune_engine(engine, "quick", cache)
    assert answers(tuned) == plain
    assert "has tactics that cannot run here (cpu.quantized_linear_gated with " + reason in caplog.text
    assert f"defaults are used; `tritium tune {engine.path}` measures here" in caplog.text
