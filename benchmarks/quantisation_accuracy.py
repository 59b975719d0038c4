"""Perplexity of the demo model's held-out text for every scheme and method; and of a variant with outlier channels.

    python benchmarks/quantisation_accuracy.py --output benchmarks/results/quantisation_accuracy.json

The variant computes the same function: 20 channels of each norm before linears are multiplied by 50, and what reads
them divided by 50. Calibration text: files of the standard library that the held-out text does not contain.
"""

import argparse
import json
import math
import platform
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tritium.calibrate.engine_logits import EngineLogits
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.quant import weights
from tritium.quantizer import quantize
from tritium.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
NUM_CHANNELS, FACTOR = 20, 50.0
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WINDOW_LEN = 512
CALIBRATION_TOKENS = 8192
RUNS = (
    ("w8a8", "rtn"), ("w8a8", "smoothquant"), ("w8a8", "awq"), ("w8a8", "gptq"), ("w8a16", "rtn"),
    ("w4a16_g128", "rtn without clipping"), ("w4a16_g128", "rtn"), ("w4a16_g128", "awq"), ("w4a16_g128", "gptq"),
    ("w4a8_g32", "rtn"), ("w4a8_g32", "awq"), ("w4a8_g32", "gptq"),
    ("w4a8_g128", "rtn"), ("w4a8_g128", "awq"), ("w4a8_g128", "gptq"),
)  # fmt: skip


def outlier_variant(path: Path) -> Path:
    """The demo model with outlier channels, in fp32, so that the division is exact enough."""
    path.mkdir()
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, path / file.name)
    config = json.loads((path / "config.json").read_text()) | {"dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.rpartition("layernorm")[1]]:
        layer, norm = name.removesuffix(".weight").rsplit(".", 1)
        channels = torch.randperm(len(tensors[name]), generator=generator)[:NUM_CHANNELS]
        tensors[name][channels] *= FACTOR
        for reader in READERS[norm]:
            tensors[f"{layer}.{reader}.weight"][:, channels] /= FACTOR
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def calibration_text(path: Path) -> Path:
    """Files of this interpreter's standard library, none of which the held-out text holds."""
    heldout, root = (DEMO / "heldout.txt").read_text(), Path(sysconfig.get_path("stdlib"))
    files = sorted(file for pattern in ("email/*.py", "logging/*.py", "[a-d]*.py") for file in root.glob(pattern))
    texts = [text for file in files if (text := file.read_text())[200:400] not in heldout]
    path.write_text("\n".join(texts))
    return path


def perplexity(engine: Engine, num_tokens: int) -> float:
    """Of the held-out text's first tokens, in windows of 512."""
    tokenizer = Tokenizer.from_directory(engine.path, model_vocab_size=engine.manifest.vocab_size)
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text())[:num_tokens]
    logits_of, total, count = EngineLogits(engine, WINDOW_LEN), 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW_LEN):
        window = ids[start : start + WINDOW_LEN]
        logits = logits_of.logits(window)[:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def measure(model: Path, text: Path, num_tokens: int, folder: Path) -> list[dict[str, Any]]:
    """Every run: perplexity, what it lost, and how much of what plain rounding lost a method gives back."""
    base = perplexity(build(model, output_dir=folder / "base", dtype="float32"), num_tokens)
    rows: list[dict[str, Any]] = [{"scheme": "float32", "method": "", "perplexity": base}]
    plain: dict[str, float] = {}
    for scheme, method in RUNS:
        known, given = weights.DIVISORS, None if method.startswith("rtn") else text
        if method == "rtn without clipping":
            weights.DIVISORS = (7.0,)
        engine = quantize(
            model,
            output_dir=folder / "engine",
            scheme=scheme,
            method=method.split()[0],
            calibration_text=given,
            num_tokens=CALIBRATION_TOKENS,
            dtype="float32",
        )
        weights.DIVISORS = known
        found = perplexity(engine, num_tokens)
        loss = math.log(found / base)
        plain.setdefault(scheme, loss) if method == "rtn" else None
        recovered = 1 - loss / plain[scheme] if scheme in plain and method != "rtn" else None
        rows.append(
            {"scheme": scheme, "method": method, "perplexity": found, "loss_nats": loss, "recovered": recovered}
        )
        print(f"{model.name:12} {scheme:11} {method:20} {found:.4f}  loss {loss:+.5f} nats  {recovered}", flush=True)
    return rows


def main() -> None:
    """Measure both models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of the held-out text")
    parser.add_argument("--model", choices=["demo", "demo with outliers"], help="one of the two, added to the output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = calibration_text(folder / "calibration.txt")
        models = {"demo": DEMO, "demo with outliers": outlier_variant(folder / "outliers")}
        chosen = [options.model] if options.model else list(models)
        results = {label: measure(models[label], text, options.tokens, folder) for label in chosen}
    known = json.loads(options.output.read_text())["results"] if options.model and options.output.exists() else {}
    about = {"machine": platform.processor(), "torch": torch.__version__, "python": platform.python_version()}
    about |= {"held_out_tokens": options.tokens, "calibration_tokens": CALIBRATION_TOKENS}
    options.output.write_text(json.dumps({"about": about, "results": known | results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
