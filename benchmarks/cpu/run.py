"""Ours beside other engines on this CPU: the same random weights, the same loads, in turn, each start its own process.

    python benchmarks/cpu/prepare.py --folder DIR         once: models, other engines' environments, converted weights
    python benchmarks/cpu/run.py --folder DIR --json FILE [--shape llama-1b] [--sides ours-w8a8 openvino-int8 ...]

A side is an engine and a format, in one process (side.py says what is measured, and how). `--rounds` times, all sides
are started one after the other, in the other order every second time. Starts are added to those that FILE has, so that
a measurement may be made in pieces; report.py makes ratios and a chart of them.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import side
from peers import PEERS, python_of
from shapes import SHAPES


def main() -> None:
    """Start the sides, add what they measured to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--sides", nargs="+", default=[f"{n}-{f}" for n, p in PEERS.items() for f in p.formats])
    parser.add_argument("--loads", nargs="+", choices=side.LOADS, default=list(side.LOADS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--round", type=int, help="the first round's number: more of it; default: one that FILE lacks")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json.exists() else {"machine": machine(), "starts": []}
    after = max((start["round"] for start in found["starts"]), default=-1) + 1
    before = after if args.round is None else args.round
    for number in range(before, before + args.rounds):
        for name in args.sides if number % 2 == 0 else reversed(args.sides):
            found["starts"].append(start_side(name, number, args))
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def start_side(name: str, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """One process of one side; its record."""
    engine, _, form = name.partition("-")
    command = [python_of(engine, args.folder), str(Path(__file__).parent / PEERS[engine].script)]
    command += ["--model", str(args.folder / args.shape / "model"), "--format", form, "--threads", str(args.threads)]
    command += ["--seed", str(100 + number), "--loads", *args.loads]
    begin, when = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    environment = os.environ | threads | PEERS[engine].environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {' '.join(command)}")
    record = json.loads(done.stdout.splitlines()[-1])
    say(name, record, time.perf_counter() - begin)
    return {"shape": args.shape, "side": name, "round": number, "when": when, "load": os.getloadavg()[0], **record}


def say(name: str, record: dict[str, Any], seconds: float) -> None:
    """One line for a person."""
    rates = "  ".join(f"{load} {rate:7.1f}" for load, rate in record["rates"].items())
    print(
        f"{name:24} {rates}  read {record['read_gb_s']['median']:5.1f} GB/s  {record['pss_mb']:5.0f} MB  "
        f"first token {record['first_token_s']:5.2f} s  ({seconds:.0f} s)",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": models[0], "cpus": len(models), "system": platform.platform()}


if __name__ == "__main__":
    main()
