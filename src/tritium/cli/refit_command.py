"""`tritium refit`: other weights for an engine that is built."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from tritium.cli.report import print_json, say
from tritium.engine.engine import Engine


def run(*, engine: Path, checkpoint: str, is_json: bool) -> None:
    """Refit the engine on disk and say what it is now."""
    loaded = Engine.load(engine)
    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=is_json or not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("weights", total=None)
        done = loaded.refit(checkpoint, progress=lambda done, total: bar.update(task, completed=done, total=total))
    manifest = done.manifest
    if is_json:
        weights = {
            "source": manifest.weights_source,
            "generation": manifest.weights_generation,
            "is_calibration_stale": manifest.is_calibration_stale,
        }
        print_json({"engine": str(done.path), "weights": weights, "seconds": manifest.timings["refit"]})
        return
    say(
        f"refit {done.path} from {checkpoint}: weights generation {manifest.weights_generation}, "
        f"{manifest.timings['refit']:.1f} s"
    )
    if manifest.is_calibration_stale:
        say("the calibration is stale: it was made for other weights; `tritium quantize` makes an engine with its own")
