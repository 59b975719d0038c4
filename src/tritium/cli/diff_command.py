"""`tritium diff`."""

from tritium.cli.inspect_command import run_diff as run

__all__ = ["run"]
