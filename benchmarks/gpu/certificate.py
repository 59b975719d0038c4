"""How far each scheme's logits are from bf16's on a GPU: `python benchmarks/gpu/certificate.py --out FILE`.

A model of the LLaMA-3 8B's widths with random weights and fewer layers, plain and with planted outliers: 1 % of the
channels of every norm are 50 times as large and the weights that read them as much smaller, so that the function is the
same. All engines have the same weights; static scales are calibrated on other random tokens. Mean KL in nats, and how
often both find the same token likeliest, over 512 random tokens.
"""

import argparse
import dataclasses
import gc
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tritium import build, models
from tritium.calibrate.calibrate import Calibration, calibrate
from tritium.calibrate.engine_logits import EngineLogits
from tritium.calibrate.work_dir import WorkDir
from tritium.config import BuildConfig
from tritium.models.presets import preset
from tritium.quant.schemes import scheme_named

VOCAB_SIZE = 16_384
NUM_TOKENS = 512
OUTLIERS, FACTOR = 0.01, 50.0
SCHEMES = (("fp8", "rtn"), ("fp8", "static"), ("w8a8", "rtn"), ("w8a8", "static"), ("w8a16", "rtn"),
           ("w4a16_g128", "rtn"))  # fmt: skip


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(length)]


def weights_of(config: models.ModelConfig, *, has_outliers: bool) -> dict[str, torch.Tensor]:
    """A state dict in bf16 by the module's names."""
    module = models.create(config)
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    state = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            tensor = 1 + 0.1 * torch.randn(parameter.shape, generator=generator, device=DEVICE)
        else:
            tensor = torch.randn(parameter.shape, generator=generator, device=DEVICE) / parameter.shape[-1] ** 0.5
        state[name] = tensor
    if has_outliers:
        width = config.hidden_size
        channels = torch.randperm(width, generator=generator, device=DEVICE)[: int(OUTLIERS * width)]
        for name, tensor in state.items():
            if tensor.dim() == 1:
                tensor[channels] *= FACTOR
            elif tensor.shape[1] == width and "embed" not in name and "o_proj" not in name:
                tensor[:, channels] /= FACTOR
    return {name: tensor.to(torch.bfloat16).cpu() for name, tensor in state.items()}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(config: models.ModelConfig, place: Path, schemes: list[str], *, has_outliers: bool) -> list[dict[str, Any]]:
    """A row for each scheme."""
    state = weights_of(config, has_outliers=has_outliers)
    module = models.create(config)
    module.load_state_dict(state, assign=True)
    window = random_prompt(NUM_TOKENS, VOCAB_SIZE, seed=3)
    base: Any = {"device": "cuda", "dtype": "bfloat16"}
    engine = build(module, BuildConfig(**base), output_dir=place / "plain")
    expected = EngineLogits(engine, NUM_TOKENS).logits(window).double().log_softmax(-1)
    rows = []
    learned: dict[str, dict[str, torch.Tensor]] = {}
    for scheme, method in ((scheme, method) for scheme, method in SCHEMES if scheme in schemes):
        if method == "static":
            windows = [random_prompt(NUM_TOKENS, VOCAB_SIZE, seed=seed) for seed in (4, 5)]
            wanted = Calibration(method="static", scheme=scheme_named(scheme), left_out=(), windows=windows)
            learned[scheme] = calibrate(models.create(config), state.__getitem__, wanted, WorkDir(None, ""))
        given = learned[scheme] if method == "static" else None
        engine = build(module, BuildConfig(**base, scheme=scheme), output_dir=place / scheme, calibration=given)
        found = EngineLogits(engine, NUM_TOKENS).logits(window).double().log_softmax(-1)
        kl = (expected.exp() * (expected - found)).sum(-1)
        agreement = (found.argmax(-1) == expected.argmax(-1)).double().mean()
        row = {"scheme": scheme, "method": method, "has_outliers": has_outliers, "mean_kl": float(kl.mean())}
        rows.append({**row, "max_kl": float(kl.max()), "top1_agreement": float(agreement)})
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache() if DEVICE == "cuda" else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--schemes", nargs="*", default=["fp8", "w8a8", "w8a16", "w4a16_g128"])
    parser.add_argument("--arch", default="llama-3-8b")
    args = parser.parse_args()
    if DEVICE != "cuda":
        print("no GPU here: by the ops' references", file=sys.stderr)
    config = preset(args.arch, dtype="bfloat16", max_model_len=NUM_TOKENS + 1)
    config = dataclasses.replace(config, num_layers=args.layers, windows=(0,) * args.layers, vocab_size=VOCAB_SIZE)
    result: dict[str, Any] = {"arch": args.arch, "layers": args.layers, "torch": torch.__version__, "rows": []}
    result["gpu"] = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    for has_outliers in (False, True):
        with tempfile.TemporaryDirectory(prefix="tritium-certificate-") as place:
            result["rows"] += measure(config, Path(place), args.schemes, has_outliers=has_outliers)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
