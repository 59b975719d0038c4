"""Starts a command's work."""

from importlib import import_module
from typing import Any

from tritium.cli.report import reporting


def do_work(module: str, options: dict[str, Any]) -> None:
    """Run `tritium.cli.<module>.run(**options)`; the module may load torch, those that declare flags do not."""
    with reporting(is_json=options["is_json"]):
        import_module(f"tritium.cli.{module}").run(**options)
