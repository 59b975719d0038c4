"""The table and the picture of the published rows in docs/gpu-measured.md, from what throughput.py has measured.

    python benchmarks/gpu/report.py

Reads the files of benchmarks/results that FILES names. A run counts for a row when its load and its configuration
are those that rows.py has today. Builds the rows' engines, without weights, for the roofline. Writes
docs/gpu-rows.svg, and in docs/gpu-measured.md what stands between the two marks.
"""

import json
import tempfile
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import NamedTuple

from roofline import RATES, tokens_per_second
from rows import ROWS, build_engine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = {  # the newest first; of older ones, whose kernels have changed since, the rows that no newer one has
    "2026-11-27-h100-throughput.json": (),
    "2026-11-27-h200-throughput-six-blocks.json": (),
    "2026-11-27-h200-throughput-full-steps.json": (),
    "2026-11-27-h200-throughput-early-loads.json": (),
    "2026-11-27-h200-throughput-decode-fp8.json": ("llama3-fp8-1000-1000", "llama2-fp8-128-128", "gptj-fp8-2048-128"),
    "2026-11-27-h200-throughput.json": ("llama3-bf16-128-128",),
}
PAGE, PICTURE = ROOT / "docs" / "gpu-measured.md", ROOT / "docs" / "gpu-rows.svg"
BEGIN, END = "<!-- written by benchmarks/gpu/report.py -->\n", "<!-- to here -->\n"
H200, H100 = RATES
SHORT = {H200: "H200", H100: "H100"}
COMPARED = ("max_num_seqs", "max_num_batched_tokens", "num_requests", "block_size")
WIDTH, BAR, LINE, LABEL, RIGHT = 900, 14, 22, 260, 190
COLOURS = {H200: "#2f6db5", H100: "#7fa8d6"}


class Published(NamedTuple):
    """The highest figures for an H200 and for an H100 that we know of."""

    title: str
    h200: float | None = None
    h100: float | None = None


# TensorRT-LLM 0.8 to 1.0, without the H100 table of 0.10 (see the page); one request: NVIDIA NIM.
ROW_TITLES = {
    "llama3-fp8-128-128": Published("LLaMA-3 8B fp8 128/128", 29_526, 28_837),
    "llama3-fp8-2048-128": Published("LLaMA-3 8B fp8 2048/128", 3_794, 3_557),
    "llama3-fp8-1000-1000": Published("LLaMA-3 8B fp8 1000/1000", 17_744),
    "llama2-fp8-128-128": Published("LLaMA-2 7B fp8 128/128", 20_618, 19_854),
    "gptj-fp8-128-128": Published("GPT-J 6B fp8 128/128", 29_168, 27_357),
    "gptj-fp8-2048-128": Published("GPT-J 6B fp8 2048/128", 2_785, 2_800),
    "llama3-fp8-batch1": Published("LLaMA-3 8B fp8, one request", None, 216),
    "llama3-bf16-128-128": Published("LLaMA-3 8B bf16 128/128"),
    "llama3-bf16-batch1": Published("LLaMA-3 8B bf16, one request"),
}


class Line(NamedTuple):
    """A row on a GPU. runs: output tokens/s of each, the newest first."""

    title: str
    gpu: str
    runs: list[float]
    published: float | None
    roofline: float


def runs() -> dict[tuple[str, str], list[float]]:
    """By row and GPU, the newest first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for file, wanted in FILES.items():
        result = json.loads((RESULTS / file).read_text())
        for name, run in result["rows"].items():
            base = name.removesuffix("-again")
            if base not in (wanted or ROW_TITLES):
                continue
            given = {"block_size": 64} | {field: run[field] for field in COMPARED if run.get(field)}
            if all(given[field] == getattr(ROWS[base], field) for field in COMPARED):
                found[base, result["gpu"]].append(run["output_tokens_per_second"])
    return found


def lines() -> list[Line]:
    """All rows that were measured, GPU by GPU."""
    found, measured = [], runs()
    with tempfile.TemporaryDirectory() as place:
        plans = {name: build_engine(ROWS[name], Path(place)).plan for name in ROW_TITLES}
    for gpu, rates in RATES.items():
        for name, row in ROW_TITLES.items():
            if (name, gpu) in measured:
                published = row.h200 if gpu == H200 else row.h100
                roofline = tokens_per_second(plans[name], ROWS[name], rates)
                found.append(Line(row.title, gpu, measured[name, gpu], published, roofline))
    return found


def table(found: list[Line]) -> str:
    """Every run's figure; the share is the newest's."""
    head = (
        "| GPU | row | requests | output tokens/s, the newest first | best published | share of the serial roofline |"
    )
    text = head + "\n|---|---|---|---|---|---|\n"
    requests = {row.title: ROWS[name].num_requests for name, row in ROW_TITLES.items()}
    for line in found:
        many = "; ".join(f"{run:,.0f}" for run in line.runs)
        published = f"{line.published:,.0f}" if line.published else ""
        share = f"{100 * line.runs[0] / line.roofline:.0f} % of {line.roofline:,.0f}"
        text += f"| {SHORT[line.gpu]} | {line.title} | {requests[line.title]:,} | {many} | {published} | {share} |\n"
    return text


def draw(found: list[Line]) -> str:
    """A bar a row: the newest run as a share of the roofline; the range of the runs, and the best published figure."""
    room, height = WIDTH - LABEL - RIGHT, 44 + LINE * len(found)
    parts = []
    for number in range(0, 101, 20):
        x = LABEL + room * number / 100
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="24" y2="{height - 14}" stroke="#dfe3e8"/>')
        parts.append(f'<text x="{x:.0f}" y="16" text-anchor="middle">{number} %</text>')
    for number, line in enumerate(found):
        top = 30 + LINE * number
        newest, best, worst = (
            LABEL + room * value / line.roofline for value in (line.runs[0], max(line.runs), min(line.runs))
        )
        parts.append(
            f'<text x="{LABEL - 8}" y="{top + 11}" text-anchor="end">{escape(line.title)}, {SHORT[line.gpu]}</text>'
        )
        parts.append(
            f'<rect x="{LABEL}" y="{top}" width="{newest - LABEL:.1f}" height="{BAR}" fill="{COLOURS[line.gpu]}"/>'
        )
        parts.append(
            f'<rect x="{worst:.1f}" y="{top + BAR / 2 - 1}" width="{best - worst:.1f}" height="2" fill="#1d2127"/>'
        )
        if line.published:
            x = LABEL + room * line.published / line.roofline
            parts.append(f'<rect x="{x - 1.5:.1f}" y="{top - 3}" width="3" height="{BAR + 6}" fill="#c2571a"/>')
        note = f"{line.runs[0]:,.0f}" + (f" (published {line.published:,.0f})" if line.published else "")
        parts.append(f'<text x="{LABEL + room + 8}" y="{top + 11}">{note}</text>')
    style = "text{font:12px sans-serif;fill:#1d2127}"
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{background}\n{body}\n</svg>\n'


def main() -> None:
    found = lines()
    PICTURE.write_text(draw(found))
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(found) + END + after)


if __name__ == "__main__":
    main()
