"""The client that compares servers of several engines (benchmarks/compare_servers.py), against our own server."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_it_starts_a_server_asks_it_and_writes_what_it_found(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"engine": "tritium", "bin": Path(sys.executable).parent, "model": ROOT / "examples" / "demo_model"}
    options |= {"out": tmp_path / "found.json", "port": port, "vocab-size": 300, "starts": 2}
    options |= {"input-len": 20, "output-len": 8, "server-args": "--max-num-seqs 4"}
    line = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    line += ["--num-requests", "6", "3"]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "compare_servers.py"), *line], check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(result["start"], result["num_requests"]) for result in found] == [(0, 6), (0, 3), (1, 6), (1, 3)]
    for result in found:
        assert (result["engine"], result["output_len"]) == ("tritium", 8)
        assert result["command"][-2:] == ["--max-num-seqs", "4"]
        tokens = 8 * result["num_requests"]
        assert result["output_tokens_per_second"] == pytest.approx(tokens / result["seconds"])
