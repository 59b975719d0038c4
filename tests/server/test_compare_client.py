"""The client that compares servers of several engines (benchmarks/gpu/compare.py), against our own server."""

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
    options |= {"num-requests": 6, "input-len": 20, "output-len": 8, "server-args": "--max-num-seqs 4"}
    line = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu" / "compare.py"), *line], check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["engine"], found["num_requests"], found["output_len"]) == ("tritium", 6, 8)
    assert [start["command"][-2:] for start in found["starts"]] == [["--max-num-seqs", "4"]] * 2
    for start in found["starts"]:
        assert start["output_tokens_per_second"] == pytest.approx(48 / start["seconds"])
