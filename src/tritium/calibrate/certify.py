"""The certificate: an engine's logits against those of its checkpoint in fp32."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tritium.calibrate.engine_logits import EngineLogits
from tritium.calibrate.reference import StreamedReference
from tritium.config import Effort
from tritium.engine.certificate import Certificate
from tritium.engine.engine import Engine
from tritium.errors import EngineError
from tritium.text.tokenizer import Tokenizer
from tritium.weights.recipes import Recipe, evaluate
from tritium.weights.source import WeightSource

# Mean KL in nats that an engine may have. The demo model: 1.7e-4 in bf16, 4e-12 in fp32 (dev/LOG-2026-11-27.md).
BOUNDS = {"float32": 1e-7, "bfloat16": 1e-3, "float16": 1e-3}
SCHEME_BOUNDS = {"w8a8": 1e-2, "w8a16": 1e-2, "fp8": 1e-2, "w4a16_g128": 5e-2, "w4a8_g32": 5e-2, "w4a8_g128": 5e-2}
INT8_BOUND = 1e-2  # of a KV cache or an embedding in 8 bits
WINDOWS: Mapping[str, tuple[int, int]] = {"quick": (1, 256), "full": (8, 512)}  # how many, tokens in each
TEXT = Path(__file__).parent / "heldout.txt"
RANDOM = "random tokens"
CHUNK = 64  # rows compared at once: 64 x 128 k fp32 logits are 33 MB


def certify(
    engine: Engine,
    module: nn.Module,
    recipes: Mapping[str, Recipe],
    source: WeightSource,
    constants: Mapping[str, Tensor],
    effort: Effort,
    *,
    max_mean_kl: float | None = None,
) -> Certificate:
    """Measure. Raises `EngineError` with the numbers when mean KL is beyond the bound.

    module, recipes, source, constants: what the engine was built from; recipes by the module's own names.
    max_mean_kl: a bound in place of the scheme's own.
    """
    start = time.perf_counter()
    windows, text = windows_for(engine, *WINDOWS[effort])

    def read(name: str) -> Tensor:
        return evaluate(recipes[name], source, constants)

    expected = StreamedReference(module, read).logits(windows)
    ours = EngineLogits(engine, max(map(len, windows)))
    kl, same = [], []
    loss_ours, loss_expected, num_predicted = 0.0, 0.0, 0
    for window, reference in zip(windows, expected, strict=True):
        found = ours.logits(window)
        kl += [_kl(reference[i : i + CHUNK], found[i : i + CHUNK]) for i in range(0, len(window), CHUNK)]
        same.append((reference.argmax(-1) == found.argmax(-1)).float())
        following = torch.tensor(window[1:])
        loss_ours += nn.functional.cross_entropy(found[:-1], following, reduction="sum").item()
        loss_expected += nn.functional.cross_entropy(reference[:-1], following, reduction="sum").item()
        num_predicted += len(window) - 1
    every = torch.cat(kl)
    manifest = engine.manifest
    bound = BOUNDS[manifest.dtype] if manifest.scheme is None else SCHEME_BOUNDS[manifest.scheme]
    if manifest.scheme is None and any(step.op == "quantized_linear" for step in engine.plan.steps):
        bound = BOUNDS["bfloat16"]  # numbers are the checkpoint's, their scales are rounded to that
    if manifest.build.get("kv_dtype") == "int8" or manifest.build.get("quantize_embedding"):
        bound = max(bound, INT8_BOUND)
    is_text = text != RANDOM
    certificate = Certificate(
        effort=effort,
        text=text,
        num_tokens=sum(map(len, windows)),
        mean_kl=every.mean().item(),
        max_kl=every.max().item(),
        top1_agreement=torch.cat(same).mean().item(),
        perplexity_engine=math.exp(loss_ours / num_predicted) if is_text else None,
        perplexity_reference=math.exp(loss_expected / num_predicted) if is_text else None,
        bound=bound if max_mean_kl is None else max_mean_kl,
        is_overridden=max_mean_kl is not None,
        is_by_reference=ours.is_by_reference,
        seconds=round(time.perf_counter() - start, 3),
    )
    _check(certificate, engine)
    return certificate


def _check(certificate: Certificate, engine: Engine) -> None:
    assert certificate.mean_kl is not None and certificate.bound is not None
    if not certificate.mean_kl <= certificate.bound:  # NaN is beyond any bound
        raise EngineError(
            f"the engine of {engine.manifest.model.get('name')} is too far from its checkpoint in fp32: "
            f"{certificate.describe()}. Find the pass with `tritium bisect`, or accept it with max_mean_kl="
        )


def _kl(reference: Tensor, ours: Tensor) -> Tensor:
    """KL(reference || ours) of each row, in float64: differences of 1e-9 nats are seen."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, ours))
    return (p.exp() * (p - q)).sum(-1)


def windows_for(engine: Engine, count: int, length: int) -> tuple[list[Sequence[int]], str]:
    """Token ids to compare on, and what they are: the held-out text where there is a tokenizer, else random ones."""
    manifest = engine.manifest
    length = min(length, manifest.max_model_len - 1)
    if (engine.path / "tokenizer.json").is_file():
        ids = Tokenizer.from_directory(engine.path, model_vocab_size=manifest.vocab_size).encode(TEXT.read_text())
        found = [ids[start : start + length] for start in range(0, len(ids) - 1, length)][:count]
        return [window for window in found if len(window) > 1], "held-out text"
    draw = random.Random(0)
    return [[draw.randrange(manifest.vocab_size) for _ in range(length)] for _ in range(count)], RANDOM
