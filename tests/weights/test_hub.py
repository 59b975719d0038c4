"""A model by its hub id: what a hub on this machine serves is fetched once, and what it does wrong is said."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 4096, "pytorch_model.bin": b"no"}
TROUBLES = ("none", "is-not-there", "is-private", "is-gated", "breaks-off")
STATUS = {"is-not-there": 404, "is-private": 401, "is-gated": 403, "unknown": 404}
CODE = {404: "RepoNotFound", 403: "GatedRepo"}
SCRIPT = """
import json, pathlib, sys
from tritium.errors import CheckpointError
from tritium.weights.hub import model_directory
found = {}
for name in sys.argv[1:]:
    try:
        path = model_directory(f"org/{name}")
        found[name] = {file.name: len(file.read_bytes()) for file in path.iterdir()}
    except CheckpointError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub: a revision, its tree, its files. A model's name says what goes wrong with it."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        trouble = next((name for name in TROUBLES if f"/org/{name}" in path), "unknown")
        if trouble in STATUS:
            self._answer(STATUS[trouble], b'{"error": "it says no"}')
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(d), "oid": "1" * 40} for n, d in FILES.items()]
            self._answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            self._answer(200, json.dumps({"id": f"org/{trouble}", "sha": SHA, "siblings": siblings}).encode())
        else:
            data = FILES[path.rpartition("/")[2]]
            self._answer(200, data, sent=1000 if trouble == "breaks-off" else len(data))

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, *, sent: int = 1 << 20) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("etag", f'"{len(data)}"')
        self.send_header("x-repo-commit", SHA)
        if status in CODE:
            self.send_header("x-error-code", CODE[status])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of fetching each model, by a process whose hub is on this machine; and by one whose hub is away."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = _fetch(tmp_path_factory.mktemp("hub"), server.server_port, *TROUBLES)
    finally:
        server.shutdown()
        server.server_close()
    return {**found, "nobody-listens": _fetch(tmp_path_factory.mktemp("hub"), server.server_port, "none")["none"]}


def _fetch(cache: Path, port: int, *names: str) -> dict[str, Any]:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_safetensors_and_configuration_are_fetched_and_other_formats_are_not(fetched: dict[str, Any]) -> None:
    assert fetched["none"] == {"config.json": 23, "model.safetensors": 4096}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, str(status)) for name, status in STATUS.items() if name != "unknown"),
        ("breaks-off", "received 1000 bytes, expected 4096"),
        ("nobody-listens", "Connection refused"),
    ],
)
def test_a_fetch_that_fails_names_the_model_says_why_and_what_to_do(
    fetched: dict[str, Any], name: str, words: str
) -> None:
    said = fetched[name]
    model = "org/none" if name == "nobody-listens" else f"org/{name}"
    assert said.startswith(f"{model} is no directory here, and could not be fetched from the Hugging Face hub: ")
    assert words in said
    assert said.endswith(". Check the id, your access to it and the connection, or name a directory")
