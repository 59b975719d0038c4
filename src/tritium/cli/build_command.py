"""`tritium build`: a model becomes an engine directory."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tritium.cli.report import print_json, say, say_config
from tritium.cli.tune_command import say_tactics
from tritium.compiler import build
from tritium.config import BuildConfig
from tritium.engine.certificate import read_certificate
from tritium.engine.engine import Engine
from tritium.errors import ConfigError
from tritium.models.config import ModelConfig
from tritium.models.encoder_config import EncoderConfig
from tritium.models.encoder_presets import ENCODER_PRESETS, encoder_preset
from tritium.models.presets import preset


def run(
    *,
    model: str | None,
    arch: str | None,
    is_dummy: bool,
    output: Path,
    config: Mapping[str, Any],
    plugins: Sequence[str],
    is_json: bool,
) -> None:
    """Build and say what was built."""
    build_config = BuildConfig(**config)
    source = choose_model(model, arch, build_config, is_dummy=is_dummy)
    say_config({"model": model or arch, **asdict(build_config), "output": output}, is_json=is_json)
    with build_progress(is_json=is_json) as progress:
        engine = build(
            source,
            build_config,
            output_dir=output,
            weights="dummy" if is_dummy else None,
            plugins=plugins,
            progress=progress,
        )
    if is_json:
        print_json({"config": asdict(build_config), **describe_engine(engine)})
        return
    about = describe_engine(engine)
    if (certificate := read_certificate(engine.path)) is not None:
        say(f"certificate: {certificate.describe()}")
    if engine.tactics is not None:
        say_tactics(engine)
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in engine.manifest.timings.items())
    ranks = f", one of {build_config.tensor_parallel} ranks" if build_config.tensor_parallel > 1 else ""
    say(f"built {about['engine']}{ranks}: {about['steps']} steps, {about['bytes'] / 1e6:.1f} MB ({stages})")


def choose_model(
    model: str | None, arch: str | None, config: BuildConfig, *, is_dummy: bool
) -> str | ModelConfig | EncoderConfig:
    """The model named on the command line: a path, a hub id, or a well-known shape."""
    if (model is None) == (arch is None):
        raise ConfigError("name a model, or a shape with --arch, not both" if model else "name a model, or use --arch")
    if arch is None:
        assert model is not None
        return model
    if not is_dummy:
        raise ConfigError(f"--arch {arch} is only a shape, without weights: add --dummy-weights")
    if arch in ENCODER_PRESETS:
        return encoder_preset(arch, dtype=config.dtype)
    return preset(arch, dtype=config.dtype, max_model_len=config.max_model_len)


def describe_engine(engine: Engine) -> dict[str, Any]:
    """An engine in numbers."""
    manifest = engine.manifest
    return {
        "engine": str(engine.path),
        "model": manifest.model,
        "dtype": manifest.dtype,
        "max_model_len": manifest.max_model_len,
        "vocab_size": manifest.vocab_size,
        "steps": len(engine.plan.steps),
        "bytes": sum(file.size for file in manifest.files.values()),
        "plan_sha256": manifest.files["plan.json"].sha256,
        "timings": manifest.timings,
        "matches": manifest.matches,
        "versions": manifest.versions,
    }


@contextmanager
def build_progress(*, is_json: bool) -> Iterator[Any]:
    """A callback for `build` that draws on a terminal; None elsewhere."""
    if is_json or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
