"""`tritium inspect`: what an engine is made of, as text or as one HTML page. `tritium diff`: two of them compared."""

import json
from collections.abc import Sequence
from pathlib import Path

from tritium.cli.report import print_json, say
from tritium.engine.engine import Engine
from tritium.errors import ConfigError
from tritium.inspection.difference import difference
from tritium.inspection.page import page
from tritium.inspection.report import Report, make_report


def run(
    *,
    engine: Path,
    html: Path | None,
    num_tokens: int,
    is_decode: bool,
    is_measured: bool,
    plugins: Sequence[str],
    is_json: bool,
) -> None:
    """Say it, or write the page."""
    loaded = Engine.load(engine, plugins=plugins)
    report = make_report(loaded, num_tokens=num_tokens, is_decode=is_decode, is_measured=is_measured)
    if html is not None:
        if html.is_dir():
            raise ConfigError(f"--html {html} is a directory: name a file to write")
        html.write_text(page(report), encoding="utf-8")
    if is_json:
        print_json(_record(report) | ({"html": str(html)} if html else {}))
    elif html is not None:
        say(f"wrote {html}")
    else:
        _say_report(report)


def run_diff(*, first: Path, second: Path, plugins: Sequence[str], is_json: bool) -> None:
    """Say what differs; nothing on standard output means that nothing does."""
    found = difference(Engine.load(first, plugins=plugins), Engine.load(second, plugins=plugins))
    if is_json:
        print_json(found)
        return
    for topic, value in found.items():
        if topic == "graph":
            print("\n".join(value))
        elif isinstance(value, dict):
            for name, pair in value.items():
                print(f"{topic} {name}: {json.dumps(pair[0])} -> {json.dumps(pair[1])}")
        elif topic == "certificate":
            print(f"{topic}: {value[0]} -> {value[1]}")
        else:
            print(f"{topic}: {', '.join(value)}")
    say("the engines differ" if found else "the engines are equal")


def _record(report: Report) -> dict[str, object]:
    steps = [
        {
            "index": step.index,
            "op": step.op,
            "module": step.module,
            "phase": step.phase,
            "kernel": step.kernel,
            "tactic": step.tactic,
            "sources": list(step.sources),
            "weights": list(step.weights),
            "bytes": step.cost.num_bytes,
            "flops": step.cost.flops,
            "seconds": step.seconds,
        }
        for step in report.steps
    ]
    ceilings = report.ceilings._asdict() if report.ceilings else None
    return {"engine": str(report.engine.path), "batch": report.batch, "ceilings": ceilings, "steps": steps}


def _say_report(report: Report) -> None:
    certificate = report.certificate.describe() if report.certificate else "none"
    print(f"{report.engine.path}: {len(report.steps)} steps, {report.batch}; certificate: {certificate}")
    for block, steps in report.blocks.items():
        seconds = [step.seconds for step in steps if step.seconds is not None]
        print(f"\n{block}: {len(steps)} steps{f', {sum(seconds) * 1e6:,.0f} µs' if seconds else ''}")
        for step in steps:
            time = f"{step.seconds * 1e6:>10,.1f} µs" if step.seconds is not None else ""
            cost = f"{step.cost.num_bytes:>14,} B {step.cost.flops:>16,} FLOP"
            print(f"  {step.index:>4} {step.op:<20} {f'{step.kernel} {step.tactic}'.strip():<24} {cost} {time}")
