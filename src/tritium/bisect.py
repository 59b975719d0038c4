"""Which optional pass, and at which site, changes an engine's numbers or its time: build without it, and compare.

Numbers are compared at every position of a text, as a certificate does; time step by step, for a prompt and a decode
(for an encoder: a text), rounds of the two engines in turn. A site is what one match of a pass has changed
(inspection/changes.py). Its time is that of its own steps; whether it changes the numbers is found by leaving the pass
out at half of the sites, and so on.
"""

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritium.calibrate.certify import windows_for
from tritium.calibrate.divergence import Outputs
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.engine import Engine
from tritium.errors import ConfigError, EngineError
from tritium.inspection.changes import Site, changed_sites
from tritium.passes.pipeline import OPTIONAL
from tritium.runtime.step_times import Rounds, StepTimer, TimedBatch, rounds_in_turn

DECODES = 8
ROUNDS = 12
MOST_SITES = 8  # that change the numbers are searched for: each costs a few builds
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Time with a pass over time without it, for a prompt and a decode: medians over the rounds; below 1 it pays.

    decode: None for an encoder. is_beyond: in three of four rounds one of them was above the bound.
    """

    prefill: float
    decode: float | None
    is_beyond: bool


@dataclass(frozen=True, kw_only=True)
class SiteFinding:
    """What a pass does at one site.

    modules: the part of the model; several where only all of them together change the numbers. ops: its steps, with
    and without the pass. divergence: of leaving it out here alone; None: within the bound, or not looked for.
    times: None for several modules.
    """

    modules: tuple[str, ...]
    ops: str
    divergence: float | None
    times: Times | None

    @property
    def is_beyond(self) -> bool:
        """One of the bounds is passed here."""
        return self.divergence is not None or (self.times is not None and self.times.is_beyond)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What leaving a pass out does. num_places: its matches. num_steps: steps that it saves.

    divergence: at the worst position; nats of KL between a decoder's next tokens with and without it, an encoder's
    squared relative error (`Outputs.divergence`). sites: all, those beyond a bound first. is_beyond: one of the bounds
    is passed, by the pass as a whole or at one of its sites.
    """

    name: str
    num_places: int
    num_steps: int
    divergence: float
    times: Times
    sites: tuple[SiteFinding, ...]
    is_beyond: bool


def bisect(
    engine: Engine,
    source: Any,
    *,
    max_divergence: float = 1e-6,
    max_ratio: float = 1.1,
    num_tokens: int = 64,
    passes: Collection[str] = (),
    report: Report | None = None,
) -> list[Finding]:
    """One finding for each optional pass that changed something in `engine`, in the pipeline's order.

    source: the model that the engine was built from, as `build` takes it. max_divergence, max_ratio: beyond either, a
    finding `is_beyond`. passes: look at these alone; none means all. Raises `EngineError` when the source does not give
    this engine's plan, or it is no decoder or encoder on a CPU; `ConfigError` for a pass that changed nothing.
    """
    if engine.manifest.kind not in ("decoder", "encoder") or engine.manifest.backend != "cpu":
        what = f"kind {engine.manifest.kind!r}, backend {engine.manifest.backend!r}"
        raise EngineError(
            f"{engine.path} ({what}): bisect compares decoders and encoders on a CPU; `tritium diff` takes any engine"
        )
    names = [name for name in OPTIONAL if engine.manifest.matches.get(name)]
    for name in passes:
        if name not in names:
            raise ConfigError(f"passes: {name!r} changed nothing in {engine.path}; those that did: {', '.join(names)}")
    names = [name for name in names if not passes or name in passes]
    with tempfile.TemporaryDirectory(prefix="tritium-bisect-") as place:
        search = _Search(engine, source, Path(place), num_tokens, max_divergence, max_ratio)
        findings = []
        for number, name in enumerate(names):
            if report is not None:
                report(name, number, len(names))
            findings.append(search.finding(name))
    return findings


class _Search:
    """The engine as it was built, and what others are compared with."""

    def __init__(
        self, engine: Engine, source: Any, place: Path, num_tokens: int, max_divergence: float, max_ratio: float
    ) -> None:
        built = {**engine.manifest.build, "disabled_passes": tuple(engine.manifest.build["disabled_passes"])}
        plain = {"certificate": "none", "max_mean_kl": None, "tune": "none", "tune_block_size": None}
        self._config = BuildConfig(**{**built, **plain})
        self._engine, self._source, self._place = engine, source, place
        self._max_divergence, self._max_ratio = max_divergence, max_ratio
        self._window = list(windows_for(engine, 1, num_tokens)[0][0])
        self.whole = self._build(())
        if self.whole.manifest.files["plan.json"] != engine.manifest.files["plan.json"]:
            raise EngineError(
                f"{source} does not give the plan of {engine.path}: name the model and the "
                "version of Tritium that it was built from"
            )
        self._expected = Outputs(self.whole, self._window)
        self._batches = self._timed(self.whole)

    def finding(self, name: str) -> Finding:
        """Leave one pass out."""
        without = self._build((name,))
        divergence = self._expected.divergence(Outputs(without, self._window))
        rounds = [
            rounds_in_turn(pair, ROUNDS) for pair in zip(self._batches, self._timed(without), strict=True)
        ]  # of the prompt and of the decode: rounds with the pass, and without it
        is_wrong = not divergence <= self._max_divergence  # NaN is beyond any bound
        sites = self._sites(name, changed_sites(self.whole, without), rounds, is_wrong=is_wrong)
        times = self._times(rounds, range(len(self.whole.plan.steps)), range(len(without.plan.steps)))
        return Finding(
            name=name,
            num_places=self._engine.manifest.matches[name],
            num_steps=len(without.plan.steps) - len(self.whole.plan.steps),
            divergence=divergence,
            times=times,
            sites=sites,
            is_beyond=is_wrong or times.is_beyond or any(site.is_beyond for site in sites),
        )

    def _sites(
        self, name: str, sites: list[Site], rounds: list[list[Rounds]], *, is_wrong: bool
    ) -> tuple[SiteFinding, ...]:
        by_module: dict[str, list[Site]] = {}
        for site in sites:
            by_module.setdefault(site.module, []).append(site)
        named = [module for module in by_module if module]
        guilty = dict(itertools.islice(self._guilty(name, named), MOST_SITES)) if is_wrong else {}
        found = []
        for module, parts in by_module.items():
            indices = [i for part in parts for i in part.first], [i for part in parts for i in part.second]
            found.append(
                SiteFinding(
                    modules=(module,),
                    ops="; ".join(dict.fromkeys(part.ops for part in parts)),
                    divergence=guilty.get((module,)),
                    times=self._times(rounds, *indices),
                )
            )
        for modules, apart in guilty.items():
            if len(modules) > 1:
                found.append(SiteFinding(modules=modules, ops="only together", divergence=apart, times=None))
        return tuple(sorted(found, key=lambda one: not one.is_beyond))

    def _guilty(self, name: str, modules: Sequence[str]) -> Iterator[tuple[tuple[str, ...], float]]:
        """The sites without which the numbers are others, by halves; several together where none alone is enough."""
        if not modules:
            return
        without = self._build(tuple(f"{name}@{module}" for module in modules))
        divergence = self._expected.divergence(Outputs(without, self._window))
        if divergence <= self._max_divergence:
            return
        if len(modules) == 1:
            yield (modules[0],), divergence
            return
        middle, is_found = len(modules) // 2, False
        for half in (modules[:middle], modules[middle:]):
            for one in self._guilty(name, half):
                is_found = True
                yield one
        if not is_found:
            yield tuple(modules), divergence

    def _times(self, rounds: list[list[Rounds]], first: Sequence[int], second: Sequence[int]) -> Times:
        """Of these steps with the pass, and those without it."""
        ratios = []
        for with_it, without_it in rounds:
            pairs = zip(with_it, without_it, strict=True)
            ratios.append([sum(a[i] for i in first) / max(1e-9, sum(b[i] for i in second)) for a, b in pairs])
        quartiles = [statistics.quantiles(of_batch, n=4)[0] for of_batch in ratios]
        prefill, *decode = map(statistics.median, ratios)
        return Times(prefill=prefill, decode=decode[0] if decode else None, is_beyond=max(quartiles) > self._max_ratio)

    def _build(self, left_out: tuple[str, ...]) -> Engine:
        config = dataclasses.replace(self._config, disabled_passes=(*self._config.disabled_passes, *left_out))
        path = self._place / ("all" if not left_out else "without")
        weights: Any = "dummy" if self._engine.manifest.dummy_seed is not None else None
        return build(self._source, config, output_dir=path, weights=weights, plugins=self._engine.plugins)

    def _timed(self, engine: Engine) -> list[TimedBatch]:
        """A prompt and a decode; of an encoder a text alone."""
        timer = StepTimer(engine)
        prompt = timer.prefill_batch(len(self._window))
        if engine.manifest.kind == "encoder":
            return [prompt]
        return [prompt, timer.decode_batch(DECODES, min(128, engine.manifest.max_model_len - 2))]
