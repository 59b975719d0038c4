"""How far each side's logits are from the checkpoint's in fp32: mean KL in nats, over the positions of one random text.

    python benchmarks/cpu/divergence.py --folder DIR --json FILE [--shape llama-1b] [--sides ours-w8a8 ...]

The reference is transformers in fp32 on the same weights. Sides as in run.py; the figures are put into FILE.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, python_of
from shapes import SHAPES

REFERENCE = "transformers-float32"


def logits(name: str, args: argparse.Namespace) -> Any:
    """[tokens, vocabulary] of a side, by a process of its own."""
    engine, _, form = name.partition("-")
    out = args.folder / args.shape / "logits.npy"
    command = [python_of(engine, args.folder), Path(__file__).parent / PEERS[engine].script, "--format", form]
    command += ["--model", args.folder / args.shape / "model", "--threads", "2", "--logits", out]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return np.load(out).astype(np.float64)


def log_softmax(values: Any) -> Any:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    """Print and keep one figure a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--sides", nargs="+", default=[f"{n}-{f}" for n, p in PEERS.items() for f in p.formats])
    args = parser.parse_args()
    exact = log_softmax(logits(REFERENCE, args))
    entropy = float(-(np.exp(exact) * exact).sum(-1).mean())
    print(f"{REFERENCE}: entropy {entropy:.3f} nats", flush=True)
    for name in args.sides:
        other = log_softmax(logits(name, args))
        mean = float((np.exp(exact) * (exact - other)).sum(-1).mean())
        print(f"{name:24} KL {mean:.5f}", flush=True)
        found = json.loads(args.json.read_text()) if args.json.exists() else {"starts": []}
        found.setdefault("divergence", {}).setdefault(args.shape, {})[name] = mean
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
