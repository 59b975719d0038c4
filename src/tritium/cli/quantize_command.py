"""`tritium quantize`: an engine with weights in fewer bits, by a method that may learn from a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritium.cli.build_command import build_progress, describe_engine
from tritium.cli.report import print_json, say, say_config
from tritium.engine.certificate import read_certificate
from tritium.errors import ConfigError
from tritium.quantizer import quantize


def run(
    *,
    model: str,
    output: Path,
    method: str,
    calibration: Path | None,
    calibration_tokens: int,
    work_dir: Path | None,
    config: Mapping[str, Any],
    is_json: bool,
) -> None:
    """Calibrate, build and say what was built."""
    if "scheme" not in config:
        raise ConfigError("name a scheme: --scheme w8a8, w8a16, w4a16_g128, w4a8_g32 or w4a8_g128")
    learning = {"calibration_text": calibration, "num_tokens": calibration_tokens, "work_dir": work_dir}
    chosen: dict[str, Any] = {"method": method, **learning}
    say_config({"model": model, **config, **chosen, "output": output}, is_json=is_json)
    with build_progress(is_json=is_json) as progress:
        engine = quantize(model, output_dir=output, progress=progress, **chosen, **config)
    about = describe_engine(engine)
    if is_json:
        print_json({"config": {**config, **{name: str(value) for name, value in chosen.items()}}, **about})
        return
    if (certificate := read_certificate(engine.path)) is not None:
        say(f"certificate: {certificate.describe()}")
    say(f"quantised {about['engine']}: {about['steps']} steps, {about['bytes'] / 1e6:.1f} MB")
