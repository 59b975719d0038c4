"""An engine process that is killed: its requests end with an error, the server says so, another engine takes over."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest


def test_a_killed_engine_ends_its_requests_with_an_error_and_is_replaced(server: Any) -> None:
    client = server.client()
    before = server.health()
    wanted = {"model": "demo_model", "prompt": "def main(", "temperature": 0}
    expected = client.completions.create(max_tokens=8, **wanted).choices[0].text
    stream = client.completions.create(max_tokens=480, stream=True, extra_body={"ignore_eos": True}, **wanted)
    next(stream)
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine process was ended by signal 9"):
        list(stream)

    # From the death on, for as long as there is no engine, the server says so and takes nothing.
    down = server.health()
    assert (down["code"], down["status"]) == (503, "restarting")
    assert server.metric("tritium_engine_up") == 0
    with pytest.raises(openai.InternalServerError, match="the engine is restarting") as caught:
        client.completions.create(max_tokens=8, **wanted)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]

    server.wait_until(lambda: server.health()["code"] == 200)
    assert server.engine_pid() != pid
    assert server.health()["num_restarts"] == before["num_restarts"] + 1
    assert client.completions.create(max_tokens=8, **wanted).choices[0].text == expected


@pytest.mark.full
def test_an_engine_that_loses_one_of_its_ranks_says_so_and_is_replaced(start_server: Any) -> None:
    server = start_server("--tensor-parallel", "2")
    client = server.client()
    wanted = {"model": "demo_model", "prompt": "def main(", "temperature": 0}
    expected = client.completions.create(max_tokens=8, **wanted).choices[0].text
    (rank,) = children_of(server.engine_pid())
    stream = client.completions.create(max_tokens=480, stream=True, extra_body={"ignore_eos": True}, **wanted)
    next(stream)
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="rank 1 of 2 was ended by signal 9"):
        list(stream)
    server.wait_until(lambda: server.health()["code"] == 200 and server.health()["num_restarts"] == 1)
    assert client.completions.create(max_tokens=8, **wanted).choices[0].text == expected
    others = children_of(server.engine_pid())
    assert server.stop() == 0
    server.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))


def children_of(pid: int) -> list[int]:
    """Processes that one of its threads has started."""
    return [int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()]


@pytest.mark.full
def test_a_request_in_the_same_moment_as_the_death_is_answered_too(server: Any) -> None:
    os.kill(server.engine_pid(), signal.SIGKILL)
    status, body = server.post("/v1/completions", {"model": "demo_model", "prompt": "x", "max_tokens": 4})
    assert status == 503
    assert body["error"]["code"] == "engine_unavailable"
    server.wait_until(lambda: server.health()["code"] == 200)


def test_an_engine_that_is_stopped_is_told_from_one_that_idles(server: Any) -> None:
    """`kill -STOP`: the process exists and computes nothing."""
    pid = server.engine_pid()
    assert server.health()["status"] == "ok"
    os.kill(pid, signal.SIGSTOP)
    try:
        server.wait_until(lambda: server.health()["status"] == "stalled")
        status, data = server.send("GET", "/health")
        assert status == 503
        assert json.loads(data)["seconds_without_progress"] >= 3
    finally:
        os.kill(pid, signal.SIGCONT)
    server.wait_until(lambda: server.health()["status"] == "ok")


def test_a_stream_that_cannot_start_has_the_errors_status(start_server: Any) -> None:
    server = start_server("--max-queue", "1")
    status, body = server.post("/v1/completions", {"model": "demo_model", "prompt": ["x", "y"], "stream": True})
    assert (status, body["error"]["code"]) == (429, "queue_full")
    assert "1" in body["error"]["message"]


@pytest.mark.full
def test_an_engine_that_reads_nothing_is_not_sent_more_and_more(server: Any) -> None:
    """Clients that leave and come again would otherwise fill the server's memory with what waits to be sent."""
    body = {"model": "demo_model", "prompt": [list(range(3000, 3510))] * 128, "stream": True}  # 200 kB
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(500):
            status = server.leave_after_headers("/v1/completions", body)
            if status == 503:
                break
        assert status == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    good = {"model": "demo_model", "prompt": "x", "max_tokens": 2}
    server.wait_until(lambda: server.post("/v1/completions", good)[0] == 200)
