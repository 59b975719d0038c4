"""`tritium serve` from start to end: the key, the queue's end, draining, an address that is taken, no torch."""

import json
import subprocess
import sys
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from tritium.cli.main import app

LONG = {"model": "mine", "prompt": "def f(", "temperature": 0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}


def test_a_key_a_name_a_short_queue_and_a_request_that_outlives_sigterm(start_server: Any) -> None:
    server = start_server("--served-model-name", "mine", "--max-queue", "4", TRITIUM_API_KEY="secret")
    for key in ("wrong", "secret-and-more", "sécret"):
        status, data = server.send("GET", "/v1/models", headers={"authorization": f"Bearer {key}".encode()})
        assert (status, json.loads(data)["error"]["code"]) == (401, "invalid_api_key")
    assert server.send("GET", "/metrics")[0] == 401
    assert server.health()["code"] == 200
    client = server.client(api_key="secret")
    assert client.models.list().data[0].id == "mine"

    with pytest.raises(openai.RateLimitError, match="accepts at most 4") as caught:
        client.completions.create(n=5, **{**LONG, "temperature": 1})
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")

    stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **LONG)
    next(stream)
    server.process.terminate()
    assert list(stream)[-1].usage.completion_tokens == 200
    assert server.process.wait(60) == 0


def test_an_address_that_is_taken_is_one_line_before_anything_is_loaded(server: Any) -> None:
    port = str(server.address[1])
    result = CliRunner().invoke(app, ["serve", str(server.model), "--port", port])
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith(f"error: cannot listen at 127.0.0.1:{port}: ") and "choose another --port" in line


def test_an_engine_that_does_not_fit_is_one_line_and_an_exit_code(server: Any) -> None:
    flags = ["--port", "0", "--kv-cache-memory", "1000", "--json"]
    result = CliRunner().invoke(app, ["serve", server.model, *flags])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "OutOfMemory" and "the KV cache holds 0 tokens" in error["message"]


def test_the_servers_process_loads_neither_torch_nor_the_compiler() -> None:
    script = (
        "import sys, tritium.cli.serve_command\n"
        "heavy = [m for m in ('torch', 'tritium.compiler', 'tritium.llm', 'tritium.graph') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
