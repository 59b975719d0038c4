"""`tritium bisect`: which pass, and at which site, changes an engine's numbers or its time."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritium.bisect import Finding, Times, bisect
from tritium.cli.report import print_json, say
from tritium.engine.engine import Engine
from tritium.errors import ConfigError

SITES_SHOWN = 4


def run(
    *,
    engine: Path,
    model: str | None,
    max_divergence: float,
    max_ratio: float,
    num_tokens: int,
    passes: Sequence[str],
    plugins: Sequence[str],
    is_json: bool,
) -> None:
    """Build without each optional pass and say what changed, and where; exit code 1 when a pass is beyond a bound."""
    loaded = Engine.load(engine, plugins=plugins)
    source = model or loaded.manifest.model.get("source", "")
    if source == "ModelConfig" or not source:
        raise ConfigError(f"{engine} was built from a shape without a checkpoint: name the model with --model")

    def report(name: str, number: int, total: int) -> None:
        if not is_json:
            say(f"without {name} ({number + 1} of {total})")

    bounds = {"max_divergence": max_divergence, "max_ratio": max_ratio}
    findings = bisect(loaded, source, **bounds, num_tokens=num_tokens, passes=passes, report=report)
    if is_json:
        print_json({"engine": str(engine), "passes": [_record(finding) for finding in findings]})
    else:
        print(f"{'pass':<24} places  steps saved    diverges  prefill  decode   (time with it / without it)")
        for one in findings:
            mark = "  <- beyond a bound" if one.is_beyond else ""
            head = f"{one.name:<24} {one.num_places:>6} {one.num_steps:>12} {one.divergence:>9.1e}"
            print(f"{head} {_times(one.times)}{mark}")
            _say_sites(one)
    if any(finding.is_beyond for finding in findings):
        sys.exit(1)


def _say_sites(finding: Finding) -> None:
    beyond = [site for site in finding.sites if site.is_beyond]
    for site in beyond[:SITES_SHOWN]:
        where = ", ".join(module or "the model" for module in site.modules)
        kl = f"diverges by {site.divergence:.1e}  " if site.divergence is not None else ""
        times = _times(site.times).lstrip() if site.times is not None else ""
        print(f"    {where}: {kl}{times}  ({site.ops})".rstrip())
    if len(beyond) > SITES_SHOWN:
        print(f"    and {len(beyond) - SITES_SHOWN} more sites (--json has all)")
    if beyond and beyond[0].modules[0]:
        print(f"    leave it out there alone: --disable-pass {finding.name}@{beyond[0].modules[0]}")


def _times(times: Times) -> str:
    decode = "-" if times.decode is None else f"{times.decode:.2f}"
    return f"{times.prefill:>7.2f} {decode:>7}"


def _record(finding: Finding) -> dict[str, Any]:
    sites = [asdict(site) | {"is_beyond": site.is_beyond} for site in finding.sites]
    return asdict(finding) | {"sites": sites}
