"""The page's pictures as inline SVG: the roofline, and the memory plan. Colours come from the page's style sheet."""

import math
from html import escape

from tritium.inspection.report import Report, StepFacts

WIDTH, HEIGHT = 400, 280  # about as wide as a phone: text keeps its size there
LEFT, BOTTOM, TOP, RIGHT = 64, 40, 12, 12


def roofline(report: Report) -> str:
    """Operations per byte against operations per second, both logarithmic, with what the machine can do at most."""
    ceilings = report.ceilings
    assert ceilings is not None
    points = [(step, step.cost.flops / step.cost.num_bytes, step.cost.flops / step.seconds) for step in report.steps
              if step.seconds and step.cost.flops and step.cost.num_bytes]  # fmt: skip
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    xs = [x for _, x, _ in points] + [ridge]
    ys = [y for *_, y in points] + [ceilings.flops_per_second]
    x_low, x_high = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs) * 3))
    y_low, y_high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys) * 1.2))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = []
    for power in range(x_low, x_high + 1):
        x, y = at(10.0**power, 10.0**y_low)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_number(10.0**power)}</text>')
    for power in range(y_low, y_high + 1):
        x, y = at(10.0**x_low, 10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_number(10.0**power)}</text>')
    slope_start = max(10.0**x_low, 10.0**y_low / ceilings.bytes_per_second)
    corner = at(ridge, ceilings.flops_per_second)
    start = at(slope_start, slope_start * ceilings.bytes_per_second)
    end = at(10.0**x_high, ceilings.flops_per_second)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (start, corner, end))
    parts.append(f'<polyline class="roof" points="{path}"/>')
    for step, intensity, rate in points:
        x, y = at(intensity, rate)
        parts.append(
            f'<circle class="{_class(step)}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_about(step)}</title></circle>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">operations per byte</text>')
    parts.append(
        f'<text transform="rotate(-90)" x="{-HEIGHT / 2:.0f}" y="14" text-anchor="middle">operations per second</text>'
    )
    label = "Roofline: each step's rate against its operations per byte, under the machine's measured ceilings"
    return _svg("".join(parts), WIDTH, HEIGHT, label)


def memory_plan(report: Report) -> str:
    """Steps from left to right, bytes of the arena from bottom to top: where each temporary lies while it is needed."""
    num_steps, total = len(report.engine.plan.steps), max(1, report.arena_bytes)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>']
    for number, buffer in enumerate(report.buffers):
        x = LEFT + buffer.life.first / num_steps * width
        w = (min(buffer.life.last, num_steps - 1) - buffer.life.first + 1) / num_steps * width
        h = buffer.size / total * height
        y = TOP + height - (buffer.offset + buffer.size) / total * height
        life = f"steps {buffer.life.first} to {buffer.life.last}"
        text = f"{buffer.name}: {_bytes(buffer.size)} at {_bytes(buffer.offset)}, {life}"
        parts.append(
            f'<rect class="buffer b{number % 4}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{max(h, 1):.1f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{_bytes(total)}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM}" text-anchor="end">0</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - BOTTOM + 16}">step 0</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 16}" text-anchor="end">step {num_steps - 1}</text>')
    return _svg(
        "".join(parts), WIDTH, HEIGHT, "Memory plan: bytes of the arena that each temporary takes, step by step"
    )


def _svg(content: str, width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _class(step: StepFacts) -> str:
    if "linear" in step.op or step.op in ("moe", "experts"):
        return "linear"
    return "attention" if "attention" in step.op else "other"


def _about(step: StepFacts) -> str:
    assert step.seconds is not None
    return escape(f"{step.index} {step.op} ({step.kernel}), {step.module}: {step.seconds * 1e6:,.0f} µs")


def _number(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g} {unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"
