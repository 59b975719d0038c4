"""What benchmarks share (DESIGN §7): distinct random prompts, lengths that are checked, where a figure is from."""

import platform
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import tritium
from tritium.cli.build_command import choose_model
from tritium.cli.options import fields_of
from tritium.cli.report import say
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.errors import ConfigError, EngineError
from tritium.llm import LLM, RequestOutput
from tritium.models.encoder_config import EncoderConfig
from tritium.runtime.gpu.device import check_device

PERCENTILES = (50, 90, 99)


@contextmanager
def opened(model: str | None, arch: str | None, config: Mapping[str, Any], *, is_dummy: bool) -> Iterator[LLM]:
    """The model, open; a well-known shape is built with random weights into a directory that goes afterwards."""
    if model is not None and is_dummy:
        raise ConfigError("--dummy-weights goes with --arch; a model is measured with its own weights")
    if arch is None:
        if model is None:
            raise ConfigError("name a model, or use --arch with --dummy-weights")
        with LLM(model, **config) as llm:
            yield llm
        return
    with tempfile.TemporaryDirectory(prefix="tritium-bench-") as place:
        path, runtime = _build_arch(arch, config, Path(place), is_dummy=is_dummy)
        with LLM(path, **runtime) as llm:
            yield llm


def provenance(llm: LLM) -> dict[str, Any]:
    """What a figure belongs to: the plan, versions, the machine."""
    return {
        "plan_sha256": llm.engine.manifest.files["plan.json"].sha256,
        "versions": {
            "tritium": tritium.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "machine": {"processor": processor(), "system": platform.platform()},
    }


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, no two alike; the same for the same seed."""
    draw = random.Random(seed)
    prompts: set[tuple[int, ...]] = set()
    if vocab_size**length < 2 * count:
        raise ConfigError(f"there are not {count} distinct prompts of {length} tokens: raise --input-len")
    while len(prompts) < count:
        prompts.add(tuple(draw.randrange(vocab_size) for _ in range(length)))
    return sorted(map(list, prompts))


def assert_lengths(outputs: Sequence[RequestOutput], input_len: int, output_len: int) -> None:
    """Raise `EngineError` unless every request had exactly these lengths."""
    for out in outputs:
        completion = out.outputs[0]
        if completion.finish_reason != "length" or len(completion.token_ids) != output_len:
            raise EngineError(
                f"request {out.request_id} ended with {completion.finish_reason!r} after {len(completion.token_ids)} "
                f"of {output_len} tokens{f': {out.error}' if out.error else ''}; nothing was measured"
            )
        if len(out.prompt_token_ids) != input_len:
            raise EngineError(f"request {out.request_id} has a prompt of {len(out.prompt_token_ids)} tokens")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (the smallest value that so many per cent do not exceed); {} of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks}


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _build_arch(arch: str, config: Mapping[str, Any], place: Path, *, is_dummy: bool) -> tuple[str, dict[str, Any]]:
    """Build an engine of a well-known shape; what is left of `config` is for running it."""
    names = {field.name for field in fields(BuildConfig)}
    build_config = BuildConfig(**fields_of(BuildConfig, config))
    source = choose_model(None, arch, build_config, is_dummy=is_dummy)
    if isinstance(source, EncoderConfig):
        raise ConfigError(
            f"--arch {arch} is an encoder and generates no text, which is what is measured here; build it with "
            "`tritium build` and time LLM.embed, as benchmarks/bench_encoder.py does"
        )
    check_device(build_config.device, build_config.tensor_parallel)
    start = time.perf_counter()
    plugins = config.get("plugins", ())
    build(source, build_config, output_dir=place / arch, weights="dummy", plugins=plugins)
    say(f"built {arch} with random weights in {time.perf_counter() - start:.1f} s")
    runtime = {name: value for name, value in config.items() if name not in names or name == "max_model_len"}
    return str(place / arch), runtime
