"""`tritium bisect`: which pass changes an engine's numbers or its time."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tritium.bisect import SITES_SHOWN, bisect
from tritium.cli.report import print_json, say
from tritium.engine.engine import Engine
from tritium.errors import ConfigError


def run(
    *,
    engine: Path,
    model: str | None,
    max_kl: float,
    max_ratio: float,
    num_tokens: int,
    plugins: Sequence[str],
    is_json: bool,
) -> None:
    """Build without each optional pass and say what changed; exit code 1 when a pass is beyond a bound."""
    loaded = Engine.load(engine, plugins=plugins)
    source = model or loaded.manifest.model.get("source", "")
    if source == "ModelConfig" or not source:
        raise ConfigError(f"{engine} was built from a shape without a checkpoint: name the model with --model")

    def report(name: str, number: int, total: int) -> None:
        if not is_json:
            say(f"without {name} ({number + 1} of {total})")

    findings = bisect(loaded, source, max_kl=max_kl, max_ratio=max_ratio, num_tokens=num_tokens, report=report)
    if is_json:
        print_json({"engine": str(engine), "passes": [asdict(finding) for finding in findings]})
    else:
        print(f"{'pass':<24} places  steps saved    max KL  prefill  decode   (time with it / without it)")
        for one in findings:
            times = f"{one.prefill_ratio:>7.2f} {one.decode_ratio:>7.2f}"
            mark = "  <- beyond a bound" if one.is_beyond else ""
            print(f"{one.name:<24} {one.num_places:>6} {one.num_steps:>12} {one.max_kl:>9.1e} {times}{mark}")
            for site in one.sites[:SITES_SHOWN] if one.is_beyond else ():
                print(f"    {site}")
            if one.is_beyond and len(one.sites) > SITES_SHOWN:
                print(f"    and {len(one.sites) - SITES_SHOWN} more")
    if any(finding.is_beyond for finding in findings):
        sys.exit(1)
