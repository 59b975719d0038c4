"""The table and the chart of docs/cpu.md, from what run.py and divergence.py have measured.

    python benchmarks/cpu/report.py

Reads benchmarks/results/*-cpu-engines*.json, each file the rounds of one version of ours; writes docs/cpu-engines.svg,
and in docs/cpu.md what stands between the two marks. A ratio is ours over the peer in the same round; its median and
range are over the rounds that have both. The first file has every side; a later one stands for a figure when it has
enough rounds of it with the peer that was the best in the first.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from chart import draw

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results/*-cpu-engines*.json"
PAGE, CHART = ROOT / "docs" / "cpu.md", ROOT / "docs" / "cpu-engines.svg"
BEGIN, END = "<!-- written by benchmarks/cpu/report.py -->\n", "<!-- to here -->\n"
FOUR = ("ours-w4a8_g32", "ours-w4a8_g32+embedding", "ours-w4a8_g128", "ours-w4a16_g128")
FOUR += ("llama.cpp-Q4_0", "llama.cpp-Q4_K_M", "openvino-int4")
EIGHT = ("ours-w8a8", "ours-w8a8+embedding", "ours-w8a16", "llama.cpp-Q8_0", "openvino-int8", "ctranslate2-int8")
SIXTEEN = ("ours-bfloat16", "llama.cpp-BF16", "openvino-fp16", "transformers-bfloat16")
NUMBERS = {"llama-1b": 1_038_682_112, "llama-160m": 134_103_552}  # weights
FEWEST_STARTS = 5
LOADS = {"decode": "decode, one request", "prefill": "prefill, 512", "r8": "8 requests", "r32": "32 requests"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure, the sides that compete for it, and what is aimed at as a ratio of ours to the best peer."""

    name: str
    sides: tuple[str, ...]
    of: Callable[[dict[str, Any]], float | None]
    aim: float
    unit: str = "tokens/s"
    is_smaller_better: bool = False


def peak(start: dict[str, Any]) -> float | None:
    """With eight requests in the cache, for a cache counts as far as it was used."""
    return float(start["peak_rss_mb"]) if "r8" in start["rates"] else None


def rate(load: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda start: start["rates"].get(load)


ROWS = (
    Row(name="decode, one request, 4 bits", sides=FOUR, of=rate("decode"), aim=1.1),
    Row(name="decode, one request, 8 bits", sides=EIGHT, of=rate("decode"), aim=1.15),
    Row(name="prefill of 512, 8 bits", sides=EIGHT, of=rate("prefill"), aim=1.2),
    Row(name="prefill of 512, 4 bits", sides=FOUR, of=rate("prefill"), aim=1.2),
    Row(name="8 requests, 4 or 8 bits", sides=FOUR + EIGHT, of=rate("r8"), aim=1.4),
    Row(name="32 requests, 4 or 8 bits", sides=FOUR + EIGHT, of=rate("r32"), aim=1.6),
    Row(name="prefill of 512, bf16", sides=SIXTEEN, of=rate("prefill"), aim=1.05),
    Row(name="decode, one request, bf16", sides=SIXTEEN, of=rate("decode"), aim=1.0),
    Row(name="8 requests, bf16", sides=SIXTEEN, of=rate("r8"), aim=1.3),
    *(
        Row(name=name, sides=sides, of=of, aim=1.0, unit=unit, is_smaller_better=True)
        for name, sides, of, unit in (
            ("peak of resident memory, 4 bits", FOUR, peak, "MB"),
            ("peak of resident memory, 8 bits", EIGHT, peak, "MB"),
            ("load to first token, 8 bits", EIGHT, itemgetter("first_token_s"), "s"),
        )
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Of a row: the median of each side that was measured, best first of ours and of the others, and the ratio."""

    row: Row
    medians: dict[str, float]
    ours: str
    peer: str
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_reached(self) -> bool:
        return self.ratio <= self.row.aim if self.row.is_smaller_better else self.ratio >= self.row.aim


def outcome(row: Row, starts: list[dict[str, Any]]) -> Outcome | None:
    """None where ours or every peer was not measured."""
    values: dict[str, dict[int, float]] = {}
    for start in starts:
        value = row.of(start) if start["side"] in row.sides else None
        if value is not None:
            values.setdefault(start["side"], {})[start["round"]] = value
    medians = {side: statistics.median(rounds.values()) for side, rounds in values.items()}
    order = sorted(medians, key=lambda side: medians[side], reverse=not row.is_smaller_better)
    ours = [side for side in order if side.startswith("ours")]
    peers = [side for side in order if not side.startswith("ours")]
    for peer in peers[:1] if ours else []:
        common = sorted(values[ours[0]].keys() & values[peer].keys())
        ratios = tuple(sorted(values[ours[0]][i] / values[peer][i] for i in common))
        if ratios:
            return Outcome(row, {side: medians[side] for side in order}, ours[0], peer, ratios)
    return None


def newest(row: Row, files: list[list[dict[str, Any]]]) -> Outcome | None:
    """Of one shape's starts, file by file, the oldest first."""
    found: Outcome | None = None
    for starts in files:
        later = outcome(row, starts)
        is_enough = found is None or (
            later is not None and found.peer in later.medians and len(later.ratios) >= FEWEST_STARTS
        )
        found = later if is_enough else found
    return found


def verdict(o: Outcome) -> str:
    """Nothing is reached by few starts."""
    if len(o.ratios) < FEWEST_STARTS:
        return "too few starts"
    return "reached" if o.is_reached else "**missed**"


def table(outcomes: list[Outcome]) -> list[str]:
    """One line a figure; nothing where no peer was measured."""
    if not outcomes:
        return []
    lines = ["| figure | ours | best peer | ratio (range; starts) | aim | |", "|---|---|---|---|---|---|"]
    for o in outcomes:
        digits = 2 if o.row.unit == "s" else 0 if o.row.unit == "MB" else 1
        ours, peer = f"{o.medians[o.ours]:,.{digits}f}", f"{o.medians[o.peer]:,.{digits}f}"
        sign = "≤" if o.row.is_smaller_better else "≥"
        lines.append(
            f"| {o.row.name}, {o.row.unit} | {ours} ({o.ours.removeprefix('ours-')}) | {peer} ({o.peer}) | "
            f"{o.ratio:.2f} ({o.ratios[0]:.2f} to {o.ratios[-1]:.2f}; {len(o.ratios)}) | {sign} {o.row.aim:g} | "
            f"{verdict(o)} |"
        )
    return lines


def all_sides(shape: str, files: list[list[dict[str, Any]]], divergence: dict[str, Any]) -> list[str]:
    """One line a side: medians of everything, each of the newest file that has it."""
    lines = [
        f"| side | {' | '.join(LOADS.values())} | bits | KL to fp32 | peak, MB | first token, s | read, GB/s |",
        f"|---{'|---' * (len(LOADS) + 5)}|",
    ]
    for side in FOUR + EIGHT + SIXTEEN:
        of_side = [found for starts in files if (found := [start for start in starts if start["side"] == side])]
        if not of_side:
            continue
        bits = 8 * of_side[-1][0]["weight_file_bytes"] / NUMBERS[shape]
        cells = [side, *(median_of(of_side, rate(load), 1) for load in LOADS), f"{bits:.2f}"]
        cells.append(f"{divergence[side]:.4f}" if side in divergence else "")
        cells += [median_of(of_side, peak, 0), median_of(of_side, itemgetter("first_token_s"), 2)]
        cells.append(median_of(of_side, lambda start: start["read_gb_s"]["median"], 1))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def median_of(files: list[list[dict[str, Any]]], of: Callable[[dict[str, Any]], float | None], digits: int) -> str:
    """Of a figure of one side, in the newest file that has it; nothing where none has."""
    for starts in reversed(files):
        values = [value for start in starts if (value := of(start)) is not None]
        if values:
            return f"{statistics.median(values):,.{digits}f}"
    return ""


def main() -> None:
    """Write the page's part and the chart."""
    records = [json.loads(path.read_text()) for path in ROOT.glob(RESULTS)]
    records.sort(key=lambda record: max(start["when"] for start in record["starts"]))
    divergence: dict[str, Any] = {}
    for record in records:
        divergence |= record.get("divergence", {})
    text, charts = [], []
    for shape in NUMBERS:
        files = [[start for start in record["starts"] if start["shape"] == shape] for record in records]
        outcomes = [o for row in ROWS if (o := newest(row, files)) is not None]
        if not outcomes:
            continue
        text += [f"**{shape}**", "", *table(outcomes), "", "Every side:", ""]
        text += [*all_sides(shape, files, divergence.get(shape, {})), ""]
        charts.append(draw([(o.row.name, o.row.unit, o.medians) for o in outcomes]))
    CHART.write_text(charts[0])  # of the first shape that peers were measured with
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(text) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
