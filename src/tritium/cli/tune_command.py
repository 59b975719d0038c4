"""`tritium tune`: measure kernels and tactics for an engine on this machine or its GPU; keep, share and merge times."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from tritium.cli.report import print_json, say
from tritium.config import Effort
from tritium.engine.engine import Engine
from tritium.engine.environment import environment, gpu_environment
from tritium.errors import ConfigError
from tritium.tuner.measure import Progress
from tritium.tuner.timing_cache import TimingCache
from tritium.tuner.tune import environment_of, tune_engine


def run(
    *,
    engine: Path | None,
    effort: Effort,
    deny: Sequence[str],
    export_to: Path | None,
    import_from: Path | None,
    plugins: Sequence[str],
    num_threads: int | None,
    block_size: int | None,
    is_json: bool,
) -> None:
    """Do what was asked for, in this order: import, deny, tune, export."""
    if engine is None and export_to is None and import_from is None:
        raise ConfigError("name an engine to tune, or use --import or --export")
    if engine is None and block_size is not None:
        raise ConfigError(f"--block-size {block_size} says how an engine is timed: name an engine to tune")
    loaded = None if engine is None else Engine.load(engine, plugins=plugins)
    if loaded is None:
        cache = TimingCache(environment(num_threads), beside=[gpu_environment()] if torch.cuda.is_available() else [])
    else:
        cache = TimingCache(environment_of(loaded, num_threads, block_size))
    result: dict[str, Any] = {"timings": str(cache.path), "environment": cache.environment}
    if import_from is not None:
        here, elsewhere = cache.merge(import_from)
        result["imported"] = {"used": here, "of other machines or versions": elsewhere}
        _say(f"{import_from}: {here} times are for this machine, {elsewhere} for others: kept, not used here", is_json)
    if deny:
        cache.deny(deny)
        result["denied"] = list(cache.denied)
        _say(f"denied on this machine: {', '.join(cache.denied)}", is_json)
    if loaded is not None:
        tuned = tune_engine(loaded, effort, cache, num_threads=num_threads, progress=_progress(is_json))
        assert tuned.tactics is not None
        result |= {"engine": str(engine), **msgspec.to_builtins(tuned.tactics)}
        if not is_json:
            say_tactics(tuned)
            say(f"times are kept in {cache.path}")
    if export_to is not None:
        result["exported"] = cache.export(export_to)
        _say(f"{export_to}: {result['exported']} times of this machine", is_json)
    if is_json:
        print_json(result)


def say_tactics(engine: Engine) -> None:
    """What was chosen for an engine that has been tuned."""
    tactics = engine.tactics
    assert tactics is not None
    say(f"tuned {engine.path}: {tactics.num_measured} times measured, {tactics.num_cached} already known")
    for choice in tactics.choices:
        op = engine.plan.steps[choice.steps[0]].op
        tactic = "; ".join(f"up to {limit}: {value}" for limit, value in choice.tactics if value)
        say(f"  {op} x {len(choice.steps)}: {choice.kernel} {tactic}".rstrip())


def _say(text: str, is_json: bool) -> None:
    if not is_json:
        say(text)


def _progress(is_json: bool) -> Progress | None:
    """Says on a terminal how far it is and about how long it will take."""
    if is_json or not sys.stderr.isatty():
        return None

    def progress(done: int, total: int, left: float) -> None:
        estimate = "" if math.isnan(left) else f", about {left:.0f} s left"
        print(f"\rmeasuring: round {done} of {total}{estimate}   ", end="", file=sys.stderr, flush=True)

    return progress
