"""BERT-base shape, texts of mixed lengths: sequences/s of ours, transformers and ONNX Runtime on the same weights.

python benchmarks/bench_encoder.py [--rounds 5] [--json FILE] [--folder DIR] [--sides ours-float32 ...]

32 texts of 8 to 256 random tokens, mean-pooled embeddings, which must agree. Each side runs in a process of its own,
with the same number of threads, one after the other, `--rounds` times in turn. A peer takes the texts as one padded
batch, and again sorted by length, as padded batches of 8: both are reported. ONNX Runtime is installed into a virtual
environment in a temporary directory, or in DIR, which then keeps it and the model; its graph goes through its own BERT
optimizer; it has no bfloat16 on CPUs. Where FILE has rounds already, those of this run are added: a measurement may be
made in pieces. In 8 bits ours is scheme w8a8 in bfloat16, ONNX Runtime's its dynamic quantisation, per channel.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, SHORTEST, LONGEST, VOCAB_SIZE = 32, 8, 256, 30522
SIDES = (
    *("ours-float32", "transformers-float32", "onnx-float32", "ours-bfloat16", "transformers-bfloat16"),
    *("ours-w8a8", "onnx-w8a8"),
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "w8a8": 0.1}  # of the largest number of an embedding
Encode = Callable[[list[list[int]]], list[Any]]


def texts() -> list[list[int]]:
    """The same on every side."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, BATCH)
    return [draw.integers(1000, VOCAB_SIZE, length).tolist() for length in lengths]


def make_model(path: Path) -> None:
    """BERT-base with random weights, by transformers."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415 - only where it is needed

    torch.manual_seed(0)
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(path)


def padded(batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, filled up to the longest."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(batch):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
    return ids, mask


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> list[Any]:
    """The mean over each text's own tokens."""
    weights = mask.unsqueeze(-1)
    return ((hidden.float() * weights).sum(1) / weights.sum(1)).tolist()


def in_batches(run: Encode, size: int) -> Encode:
    """Sorted by length, `size` texts at a time; answers in the order of the texts."""

    def encode(prompts: list[list[int]]) -> list[Any]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[Any] = [None] * len(prompts)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for i, answer in zip(chosen, run([prompts[i] for i in chosen]), strict=True):
                found[i] = answer
        return found

    return encode


def ours(model: Path, dtype: str) -> dict[str, Encode]:
    from tritium import LLM, build  # noqa: PLC0415

    how = {"dtype": "bfloat16", "scheme": "w8a8"} if dtype == "w8a8" else {"dtype": dtype}
    engine = build(model, **how, output_dir=model.parent / f"engine-{dtype}")
    llm = LLM(engine.path, num_threads=torch.get_num_threads())

    def encode(prompts: list[list[int]]) -> list[Any]:
        found = llm.embed(prompts, pooling="mean", normalize=False, use_progress=False)
        return [output.outputs.embedding for output in found]

    return {"packed": encode}


def transformers(model: Path, dtype: str) -> dict[str, Encode]:
    from transformers import BertModel  # noqa: PLC0415

    module: Any = BertModel.from_pretrained(model, dtype=getattr(torch, dtype), add_pooling_layer=False).eval()

    @torch.inference_mode()
    def encode(prompts: list[list[int]]) -> list[Any]:
        ids, mask = padded(prompts)
        return mean(module(ids, attention_mask=mask).last_hidden_state, mask)

    return {"padded": encode, "sorted by 8": in_batches(encode, 8)}


def onnx(model: Path, dtype: str) -> dict[str, Encode]:
    import onnxruntime  # noqa: PLC0415
    from onnxruntime.transformers.optimizer import optimize_model  # noqa: PLC0415
    from transformers import BertModel  # noqa: PLC0415

    module: Any = BertModel.from_pretrained(model, add_pooling_layer=False, attn_implementation="eager").eval()
    plain, optimized = model.parent / "plain.onnx", model.parent / "optimized.onnx"
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "hidden")}

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.module(input_ids, attention_mask=attention_mask).last_hidden_state

    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"]}
    example = padded([[5] * 9, [6] * 4])
    torch.onnx.export(Hidden(), example, str(plain), dynamic_axes=axes, dynamo=False, opset_version=17, **names)
    optimize_model(str(plain), model_type="bert", num_heads=12, hidden_size=768).save_model_to_file(str(optimized))
    if dtype == "w8a8":
        from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415

        source, optimized = optimized, model.parent / "int8.onnx"
        quantize_dynamic(source, optimized, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(optimized), options, providers=["CPUExecutionProvider"])

    def encode(prompts: list[list[int]]) -> list[Any]:
        ids, mask = padded(prompts)
        (hidden,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return mean(torch.from_numpy(hidden), mask)

    return {"padded": encode, "sorted by 8": in_batches(encode, 8)}


def measure(side: str, model: Path, repeats: int) -> dict[str, Any]:
    """One process: seconds of each repeat by way, and the embeddings."""
    name, _, dtype = side.partition("-")
    prompts, seconds, answers = texts(), {}, None
    for way, encode in {"ours": ours, "transformers": transformers, "onnx": onnx}[name](model, dtype).items():
        answers = encode(prompts)  # warm-up
        seconds[way] = []
        for _ in range(repeats):
            start = time.perf_counter()
            encode(prompts)
            seconds[way].append(time.perf_counter() - start)
    return {"seconds": seconds, "answers": answers}


def peer_python(folder: Path) -> str:
    """A virtual environment with ONNX Runtime that sees this one's packages behind its own."""
    python = str(folder / "bin" / "python")
    if Path(python).exists():
        return python
    venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "onnx"], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(site) / "behind.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.one, args.model, args.repeats)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        model = folder / "model"
        if not model.exists():
            make_model(model)
        other = peer_python(folder / "venv") if any(side.startswith("onnx") for side in args.sides) else ""
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        rates: dict[str, list[float]] = {}
        if args.json and args.json.exists():
            rates = json.loads(args.json.read_text())["rates"]
        answers = {}
        for _ in range(args.rounds):
            for side in args.sides:
                python = other if side.startswith("onnx") else sys.executable
                command = [python, __file__, "--one", side, "--model", str(model), "--threads", str(args.threads)]
                command += ["--repeats", str(args.repeats)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                result = json.loads(done.stdout.splitlines()[-1])
                for way, seconds in result["seconds"].items():
                    rates.setdefault(f"{side}, {way}", []).append(BATCH / min(seconds))
                answers[side] = np.array(result["answers"])
        check(answers)
        report(rates, args)


def check(answers: dict[str, Any]) -> None:
    """Embeddings must agree, or the rates mean nothing."""
    exact = answers.get("transformers-float32")
    for side, found in answers.items() if exact is not None else ():
        error = float(np.abs(found - exact).max() / np.abs(exact).max())
        assert error <= TOLERANCE[side.partition("-")[2]], f"{side} differs from transformers by {error:.1e}"


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
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
        record = {"rates": rates, "ratios": ratios, "threads": args.threads, "lengths": lengths}
        args.json.write_text(json.dumps(record | {"torch": str(torch.__version__)}, indent=1) + "\n")


def dtype_of(name: str) -> str:
    """`ours-float32, packed` -> `float32`."""
    return name.partition(",")[0].partition("-")[2]


if __name__ == "__main__":
    main()
