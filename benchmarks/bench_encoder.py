"""BERT-base shape, texts of mixed lengths: sequences/s of ours and of transformers, ONNX Runtime and OpenVINO.

python benchmarks/bench_encoder.py [--rounds 5] [--json FILE] [--folder DIR] [--sides ours-float32 ...]

32 texts of 8 to 256 random tokens, the same weights, mean-pooled embeddings, which must agree. Each side (a module of
encoder/) runs in a process of its own, with the same number of threads, one after the other, `--rounds` times in turn.
A peer takes the texts as one padded batch, and again sorted by length, as padded batches of 8: both are reported. ONNX
Runtime and OpenVINO are installed into virtual environments in a temporary directory, or in DIR, which then keeps them
and the model. ONNX Runtime's graph goes through its own BERT optimizer; it has no bfloat16 on CPUs. Where FILE has
rounds already, those of this run are added: a measurement may be made in pieces. In 8 bits ours is scheme w8a8 in
bfloat16, ONNX Runtime's its dynamic quantisation, per channel, and OpenVINO's NNCF's calibrated one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from encoder.side import BATCH, texts

SIDES = (
    *("ours-float32", "transformers-float32", "onnx-float32", "ours-bfloat16", "transformers-bfloat16"),
    *("ours-w8a8", "onnx-w8a8", "openvino-w8a8"),
)
MODULES = {"ours": "encoder.ours"} | {n: f"encoder.peer_{n}" for n in ("transformers", "onnx", "openvino")}
PACKAGES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "nncf")}  # others run in this environment
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "w8a8": 0.1}  # of the largest number of an embedding
STATIC_TOLERANCE = 0.2  # where one scale serves all activations of a site: OpenVINO's int8


def make_model(path: Path) -> None:
    """BERT-base with random weights, by transformers."""
    torch.manual_seed(0)
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(path)


def peer_python(name: str, folder: Path) -> str:
    """A virtual environment with a peer's packages that sees this one's behind its own."""
    if name not in PACKAGES:
        return sys.executable
    place = folder / f"venv-{name}"
    python = str(place / "bin" / "python")
    if (place / "ready").exists():
        return python
    venv.create(place, with_pip=True, clear=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(site) / "behind.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    (place / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        model = folder / "model"
        if not model.exists():
            make_model(model)
        pythons = {name: peer_python(name, folder) for name in {side.partition("-")[0] for side in args.sides}}
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
        rates: dict[str, list[float]] = found.get("rates", {})
        answers = {}
        for _ in range(args.rounds):
            for side in args.sides:
                name, _, dtype = side.partition("-")
                command = [pythons[name], "-m", MODULES[name], "--model", str(model)]
                command += ["--dtype", dtype, "--threads", str(args.threads), "--repeats", str(args.repeats)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                result = json.loads(done.stdout.splitlines()[-1])
                for way, seconds in result["seconds"].items():
                    rates.setdefault(f"{side}, {way}", []).append(BATCH / min(seconds))
                answers[side] = np.array(result["answers"])
        report(rates, found.get("errors", {}) | check(answers), args)


def check(answers: dict[str, Any]) -> dict[str, float]:
    """Errors of embeddings against transformers' in fp32, if those are there: small, or the rates mean nothing."""
    exact, errors = answers.get("transformers-float32"), {}
    for side, found in answers.items() if exact is not None else ():
        errors[side] = float(np.abs(found - exact).max() / np.abs(exact).max())
        tolerance = STATIC_TOLERANCE if side == "openvino-w8a8" else TOLERANCE[side.partition("-")[2]]
        assert errors[side] <= tolerance, f"{side} differs from transformers by {errors[side]:.1e}"
        print(f"{side:60} differs by {errors[side]:.1e} of the largest number")
    return errors


def report(rates: dict[str, list[float]], errors: dict[str, float], args: argparse.Namespace) -> None:
    """Rates and, per dtype, ratios to each peer: median, lowest and highest."""
    ratios: dict[str, list[float]] = {}
    for mine in rates:
        for peer in rates:
            is_pair = mine.startswith("ours") and not peer.startswith("ours")
            if is_pair and dtype_of(mine) == dtype_of(peer):
                ratios[f"{mine} / {peer}"] = sorted(a / b for a, b in zip(rates[mine], rates[peer], strict=True))
    for name, values in rates.items():
        print(f"{name:60} {statistics.median(values):7.2f} sequences/s")
    for name, values in ratios.items():
        print(f"{name:60} {statistics.median(values):7.2f} ({values[0]:.2f} to {values[-1]:.2f})")
    if args.json:
        lengths = [len(text) for text in texts()]
        record = {"rates": rates, "ratios": ratios, "errors": errors, "threads": args.threads, "lengths": lengths}
        args.json.write_text(json.dumps(record | {"torch": str(torch.__version__)}, indent=1) + "\n")


def dtype_of(name: str) -> str:
    """`ours-float32, packed` -> `float32`."""
    return name.partition(",")[0].partition("-")[2]


if __name__ == "__main__":
    main()
