"""The demo's view: lines when nobody watches, a picture on a terminal, and true numbers in both."""

import io
from types import SimpleNamespace

from rich.console import Console

from tritium.cli.live import LiveView, PlainView, Rate, status
from tritium.runtime.outputs import CompletionOutput, RequestOutput

STATS = SimpleNamespace(num_running=2, num_waiting=1, num_blocks_used=30, num_blocks_total=1200)


def delta(text: str, num_tokens: int = 1, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(text=text, token_ids=[0] * num_tokens, finish_reason=finish_reason)  # type: ignore[arg-type]
    return RequestOutput(request_id="0", prompt=None, prompt_token_ids=[1], outputs=[completion])


def test_the_rate_is_that_of_the_last_second_or_of_the_last_arrivals() -> None:
    now = [0.0]
    rate = Rate(clock=lambda: now[0])
    for _ in range(200):  # 100 tokens/s in arrivals of 1
        now[0] += 0.01
        rate.add(1)
    for _ in range(200):  # then 1000 tokens/s
        now[0] += 0.01
        rate.add(10)
    assert rate.total == 2200
    assert 990 < rate.now < 1010
    now[0] += 30.0  # then nothing for long: a slow step
    for _ in range(8):
        rate.add(1)
    assert 0 < rate.now < 60
    assert round(rate.seconds, 6) == 34.0


def test_the_status_line_has_requests_tokens_and_blocks() -> None:
    rate = Rate(clock=iter([0.0, 1.0, 1.0]).__next__)
    rate.add(50)
    assert status(STATS, rate) == "2 requests in flight + 1 waiting | 50 tokens/s | KV blocks 30 of 1,200"


def test_plain_lines_show_a_status_and_each_complete_output_once() -> None:
    lines: list[str] = []
    with PlainView(["def f(", "import\nos"], lambda: STATS, lines.append) as view:
        view.update(0, delta("x"))
        view.update(1, delta("\nos.path"))
        view.update(0, delta("):", 2, "length"))
        view.update(1, delta("", 0, "stop"))
    assert "2 requests in flight" in lines[0]
    assert lines[1:] == [
        "--- def f( (3 tokens, length)",
        "def f(x):",
        "--- import (1 tokens, stop)",
        "import\nos\nos.path",
    ]
    assert view.rate.total == 4


def test_the_live_picture_shows_every_request_and_fits_the_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=6)
    prompts = ["def f(", "import", "class A", "while True:"]
    with LiveView(prompts, lambda: STATS, console) as view:
        view.update(0, delta("a\nb" + "c" * 200))
        view.update(1, delta("done", 1, "stop"))
    console = Console(file=io.StringIO(), width=60, height=6)
    console.print(view._draw())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "2 requests in flight" in lines[0]
    assert lines[-3].startswith("▸     1 def f(") and lines[-3].rstrip().endswith("ccc")
    assert lines[-2].startswith("✓     1 import") and "done" in lines[-2]
    assert lines[-1].startswith("·     0 class A")
    assert all(len(line) <= 60 for line in lines)
