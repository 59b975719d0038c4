"""Shows several requests while they run: a live picture on a terminal, plain lines anywhere else."""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tritium.llm import RequestOutput

REFRESH_PER_SECOND = 10
RATE_WINDOW = 1.0  # seconds over which tokens/s is taken, or longer, over as many arrivals:
RATE_ARRIVALS = 64  # (requests report one by one after each step, so that fewer would be part of a step)


class Stats(Protocol):
    """What is read of `LLM.stats`."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_blocks_used(self) -> int: ...
    @property
    def num_blocks_total(self) -> int: ...


@dataclass
class Row:
    """One request as it is shown."""

    prompt: str
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None


class Rate:
    """Tokens a second, lately and since the start."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)])
        self.total = 0

    def add(self, num_tokens: int) -> None:
        """So many tokens have just arrived."""
        self.total += num_tokens
        now = self._clock()
        self._recent.append((now, self.total))
        while len(self._recent) > RATE_ARRIVALS and now - self._recent[1][0] > RATE_WINDOW:
            self._recent.popleft()

    @property
    def now(self) -> float:
        """Tokens a second, lately."""
        then, count = self._recent[0]
        return (self.total - count) / max(self._clock() - then, 1e-9)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start


class PlainView:
    """Lines: a status each second, and each output when it is complete."""

    def __init__(self, prompts: Sequence[str], stats: Callable[[], Stats], write: Callable[[str], object]) -> None:
        self.rows = [Row(prompt) for prompt in prompts]
        self.rate = Rate()
        self._stats = stats
        self._write = write
        self._next_status = 0.0

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def update(self, index: int, delta: RequestOutput) -> None:
        """Take what one request gained."""
        row, output = self.rows[index], delta.outputs[0]
        row.text += output.text
        row.num_tokens += len(output.token_ids)
        row.finish_reason = output.finish_reason
        self.rate.add(len(output.token_ids))
        self._show(row)

    def _show(self, row: Row) -> None:
        if self.rate.seconds >= self._next_status:
            self._next_status = self.rate.seconds + 1.0
            self._write(f"[{self.rate.seconds:5.1f} s] {status(self._stats(), self.rate)}")
        if row.finish_reason is not None:
            self._write(f"--- {first_line(row.prompt)} ({row.num_tokens} tokens, {row.finish_reason})")
            self._write(row.prompt + row.text)


class LiveView(PlainView):
    """The same on a terminal: one line a request, redrawn in place."""

    def __init__(self, prompts: Sequence[str], stats: Callable[[], Stats], console: Console) -> None:
        super().__init__(prompts, stats, console.print)
        self._console = console
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=REFRESH_PER_SECOND)

    def __enter__(self) -> "LiveView":
        self._live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def _show(self, row: Row) -> None:
        """Nothing to do: the picture is redrawn by time."""

    def _draw(self) -> RenderableType:
        stats = self._stats()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(status(stats, self.rate), style="bold"),
            ProgressBar(total=max(1, stats.num_blocks_total), completed=stats.num_blocks_used, width=20),
        )
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=1)
        table.add_column(width=5, justify="right")
        table.add_column(width=24, no_wrap=True, overflow="ellipsis")
        table.add_column(ratio=1, no_wrap=True, overflow="crop")
        for row in self.rows[: max(1, self._console.height - 3)]:
            mark, style = (
                ("·", "dim") if not row.num_tokens else ("▸", "") if row.finish_reason is None else ("✓", "green")
            )
            tail = (row.text if row.finish_reason is None else row.text.rstrip()).replace("\n", "⏎ ")
            shown = Text(tail[-max(10, self._console.width - 34) :], style=style)
            table.add_row(
                Text(mark, style=style), str(row.num_tokens), Text(first_line(row.prompt), style="cyan"), shown
            )
        return Group(head, table)


def make_view(prompts: Sequence[str], stats: Callable[[], Stats]) -> PlainView:
    """The view that suits standard output."""
    if sys.stdout.isatty():
        return LiveView(prompts, stats, Console())
    return PlainView(prompts, stats, lambda text: print(text, flush=True))


def status(stats: Stats, rate: Rate) -> str:
    """One line: requests in flight, tokens a second, KV blocks used."""
    waiting = f" + {stats.num_waiting} waiting" if stats.num_waiting else ""
    return (
        f"{stats.num_running} requests in flight{waiting} | {rate.now:,.0f} tokens/s | "
        f"KV blocks {stats.num_blocks_used:,} of {stats.num_blocks_total:,}"
    )


def first_line(text: str) -> str:
    """Enough of a prompt to recognise it by."""
    return text.strip().splitlines()[0] if text.strip() else ""
