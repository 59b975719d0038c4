"""One server for all tests of this directory, as a user starts it; the same engine in this process is the oracle."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tritium import LLM
from tritium.testing.tiny_encoders import encoder_directory, write_sentence_files

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_model"
LIMITS = {"max_num_seqs": 64, "max_model_len": 512, "num_threads": 1, "kv_cache_memory": 256 << 20}
FLAGS = [word for name, value in LIMITS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass
class RunningServer:
    """A `tritium serve` process."""

    process: subprocess.Popen[str]
    url: str
    model: str

    @classmethod
    def start(cls, *flags: str, model: Path = DEMO, **environment: str) -> "RunningServer":
        limits = FLAGS if model == DEMO else []
        command = [sys.executable, "-m", "tritium", "serve", str(model), "--port", "0", "--json", *limits, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the server said nothing before it ended"
        return cls(process, json.loads(line)["config"]["url"], str(model))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """A bare HTTP request: status and body."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        status, data = self.send("POST", path, json.dumps(body).encode())
        return status, json.loads(data)

    def leave_after_headers(self, path: str, body: Any) -> int:
        """Post, read the status and nothing of the answer, and close."""
        connection = http.client.HTTPConnection(*self.address, timeout=5)
        try:
            connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        """What it says of itself; `code` is the HTTP status."""
        status, data = self.send("GET", "/health")
        return {"code": status, **json.loads(data)}

    def metric(self, name: str) -> float:
        """The value of a metric, labels included in its name; 0 before its first count."""
        for line in self.send("GET", "/metrics")[1].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def engine_pid(self) -> int:
        """The process id of its engine."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                return int(stat.parent.name)
        raise AssertionError("the server has no engine process")

    @staticmethod
    def wait_until(holds: Callable[[], bool]) -> None:
        """Poll; fail when it takes longer than any machine needs."""
        deadline = time.monotonic() + 120
        while not holds():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    running = RunningServer.start("--stall-seconds", "3")
    yield running
    assert running.stop() == 0


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of one test's own, and ends those that are left."""
    started: list[RunningServer] = []

    def start(*flags: str, **options: Any) -> RunningServer:
        started.append(RunningServer.start(*flags, **options))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An encoder as sentence-transformers keeps them, the oracle of `embedding_server`."""
    path, _ = encoder_directory(tmp_path_factory.mktemp("embedder") / "tiny_bert", "BertModel")
    write_sentence_files(path)
    with LLM(path, num_threads=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def embedding_server(embedder: LLM) -> Iterator[RunningServer]:
    running = RunningServer.start("--num-threads", "1", "--max-queue", "100", model=embedder.engine.path)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, **LIMITS) as llm:
        yield llm
