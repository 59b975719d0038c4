"""An engine as one HTML page: no script, no network, readable on a phone, light and dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tritium.inspection.pictures import memory_plan, roofline
from tritium.inspection.report import Report, StepFacts

STYLE = Path(__file__).with_name("page.css")


def page(report: Report) -> str:
    """The whole document."""
    manifest = report.engine.manifest
    name = escape(str(manifest.model.get("name", "engine")))
    body = "".join([
        f"<header><h1>{name}</h1><p>{escape(_summary(report))}</p></header><main>",
        _section("certificate", "Certificate", f"<p>{escape(_certificate(report))}</p>"),
        _pictures(report),
        _section("passes", "What the passes did", _passes(report)),
        _section("steps", "Steps", "".join(_block(name, steps) for name, steps in report.blocks.items())),
        _section("engine", "Engine", _facts(report)),
        "</main>",
    ])  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: a Tritium engine</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text()}</style></head><body>{body}</body></html>\n"
    )


def _summary(report: Report) -> str:
    manifest = report.engine.manifest
    total = sum(step.seconds or 0 for step in report.steps)
    measured = f"; {report.batch}: {total * 1e3:,.1f} ms in all" if report.ceilings else ""
    kv_dtype = manifest.build.get("kv_dtype")
    formats = [manifest.dtype, manifest.scheme, f"KV cache in {kv_dtype}" if kv_dtype == "int8" else None]
    formats += ["embedding in int8"] if manifest.build.get("quantize_embedding") else []
    described = ", ".join(filter(None, [manifest.model.get("architecture"), *formats]))
    return f"{described}, {len(report.steps)} steps{measured}"


def _certificate(report: Report) -> str:
    if report.engine.manifest.kind == "encoder":
        return "None: decoders alone are compared with their checkpoint in fp32."
    if report.certificate is None:
        return "None: this engine was not compared with its checkpoint (tritium build --certificate quick)."
    return report.certificate.describe()


def _pictures(report: Report) -> str:
    parts = []
    if report.ceilings is not None:
        rates = (
            f"Measured here: {report.ceilings.bytes_per_second / 1e9:.1f} GB/s read from memory, "
            f"{report.ceilings.flops_per_second / 1e9:,.0f} GFLOP/s in a matrix product of torch. A point on the line "
            "does all that the machine can; points above the slope read from a cache."
        )
        if any(step.op.startswith("quantized") for step in report.steps):
            rates += " Linears over integers of 8 bits may lie above the level line: it is that of a product in floats."
        kinds = "".join(f'<span class="{kind}">{kind}</span> ' for kind in ("linear", "attention", "other"))
        legend = f'<p class="legend">{kinds}</p>'
        parts.append(_section("roofline", "Roofline", f"<p>{rates}</p>{roofline(report)}{legend}"))
    parts.append(_section("memory", "Memory plan", f"<p>Temporaries of {report.batch}.</p>{memory_plan(report)}"))
    return "".join(parts)


def _passes(report: Report) -> str:
    covered = sum(len(step.sources) for step in report.steps)
    text = (
        f"<p>{covered} calls of the model are {len(report.steps)} steps: {covered - len(report.steps)} launches, and "
        "the intermediate results between them, are saved.</p>"
    )
    rows = [(escape(name), str(count)) for name, count in report.engine.manifest.matches.items() if count]
    return text + _table("Passes that changed something", ("pass", "places"), rows)


def _block(name: str, steps: Sequence[StepFacts]) -> str:
    total = sum(step.seconds or 0 for step in steps)
    time = f", {total * 1e6:,.0f} µs" if steps[0].seconds is not None else ""
    head = ("step", "op", "µs", "of the ceiling", "bytes", "FLOPs", "kernel", "covers", "weights")
    rows = [_row(step) for step in steps]
    title = f"{escape(name)}: {len(steps)} steps{time}"
    return f"<details><summary>{title}</summary>{_table(name, head, rows)}</details>"


def _row(step: StepFacts) -> tuple[str, ...]:
    share = f"{step.attainable / step.seconds:.0%}" if step.seconds and step.attainable else ""
    fused = f"{len(step.sources)} fused: " if len(step.sources) > 1 else ""
    kernel = f"{step.kernel} {step.tactic}".strip()
    return (
        str(step.index),
        f"{escape(step.op)}<br><small>{escape(step.module)} {escape(step.place)}</small>",
        f"{step.seconds * 1e6:,.1f}" if step.seconds is not None else "",
        share,
        f"{step.cost.num_bytes:,}",
        f"{step.cost.flops:,}",
        escape(kernel),
        escape(fused + ", ".join(step.sources)),
        escape(", ".join(step.weights)),
    )


def _facts(report: Report) -> str:
    manifest = report.engine.manifest
    facts = {
        "path": report.engine.path,
        "source": manifest.model.get("source", ""),
        "weights generation": manifest.weights_generation,
        "invariance": manifest.invariance,
        "longest sequence": manifest.max_model_len,
        "plan sha256": manifest.files["plan.json"].sha256,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "tuned": f"{report.engine.tactics.effort}" if report.engine.tactics else "no",
    }
    return _table("Engine", ("what", "value"), [(escape(k), escape(str(v))) for k, v in facts.items()])


def _table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML. Wide tables scroll inside; the keyboard can reach them."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">'
        f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'
