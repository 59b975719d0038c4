"""Which optional pass changes an engine's numbers or its time: build without each, and compare.

Numbers are compared at every position of a text, as a certificate does; time step by step, for a prompt and a decode.
When a pass changes the numbers, the steps that it made are told: those of the engine with it whose captured calls the
engine without it computes by other steps.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritium.calibrate.certify import windows_for
from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import EngineError
from tritium.passes.pipeline import OPTIONAL
from tritium.runtime.step_times import StepTimer

DECODES = 8
SITES_SHOWN = 4
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What leaving a pass out does. Ratios: time with the pass over time without it; below 1 it pays.

    max_kl: nats between the next-token distributions with and without it, at worst. sites: steps that it made.
    """

    name: str
    num_places: int
    num_steps: int
    max_kl: float
    prefill_ratio: float
    decode_ratio: float
    sites: tuple[str, ...]
    is_beyond: bool


def bisect(
    engine: Engine,
    source: Any,
    *,
    max_kl: float = 1e-6,
    max_ratio: float = 1.0,
    num_tokens: int = 64,
    report: Report | None = None,
) -> list[Finding]:
    """One finding for each optional pass that changed something in `engine`, in the pipeline's order.

    source: the model that the engine was built from, as `build` takes it. max_kl, max_ratio: beyond either, a finding
    `is_beyond`. Raises `EngineError` when the source does not give this engine's plan.
    """
    config = BuildConfig(
        **{**engine.manifest.build, "disabled_passes": tuple(engine.manifest.build["disabled_passes"])}
    )
    config = dataclasses.replace(config, certificate="none", max_mean_kl=None, tune="none")
    names = [name for name in OPTIONAL if engine.manifest.matches.get(name)]
    window = list(windows_for(engine, 1, num_tokens)[0][0])
    with tempfile.TemporaryDirectory(prefix="tritium-bisect-") as place:
        whole = _build(source, config, Path(place) / "all", engine)
        if whole.manifest.files["plan.json"] != engine.manifest.files["plan.json"]:
            raise EngineError(
                f"{source} does not give the plan of {engine.path}: name the model and the "
                "version of Tritium that it was built from"
            )
        expected, times = _measure(whole, window)
        findings = []
        for number, name in enumerate(names):
            if report is not None:
                report(name, number, len(names))
            disabled = (*config.disabled_passes, name)
            without = _build(source, dataclasses.replace(config, disabled_passes=disabled), Path(place) / name, engine)
            found, other = _measure(without, window)
            kl = float(_kl(found, expected).max())
            ratios = [with_it / without_it for with_it, without_it in zip(times, other, strict=True)]
            findings.append(
                Finding(
                    name=name,
                    num_places=engine.manifest.matches[name],
                    num_steps=len(without.plan.steps) - len(whole.plan.steps),
                    max_kl=kl,
                    prefill_ratio=ratios[0],
                    decode_ratio=ratios[1],
                    sites=_sites(whole, without),
                    is_beyond=not kl <= max_kl or max(ratios) > max_ratio,
                )
            )
    return findings


def _build(source: Any, config: BuildConfig, path: Path, engine: Engine) -> Engine:
    if engine.manifest.dummy_seed is not None:
        return build(source, config, output_dir=path, weights="dummy", plugins=engine.plugins)
    return build(source, config, output_dir=path, plugins=engine.plugins)


def _measure(engine: Engine, window: list[int]) -> tuple[torch.Tensor, tuple[float, float]]:
    """Logits at every position; seconds of a prompt and of a decode."""
    logits = EngineLogits(engine, len(window)).logits(window)
    timer = StepTimer(engine)
    context = min(128, engine.manifest.max_model_len - 2)
    return logits, (sum(timer.prefill(len(window))), sum(timer.decode(DECODES, context)))


def _sites(whole: Engine, without: Engine) -> tuple[str, ...]:
    """The steps that only the engine with the pass has: by operation and the captured calls they cover."""
    known = {(step.op, step.sources) for step in without.plan.steps}
    return tuple(
        f"{step.op}({', '.join(step.sources)})" for step in whole.plan.steps if (step.op, step.sources) not in known
    )


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    p, q = (torch.log_softmax(x.double(), -1) for x in (second, first))
    return (p.exp() * (p - q)).sum(-1)
