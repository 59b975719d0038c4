"""Builds an engine in a process of its own, so that the process that runs it never loads the compiler.

    python -m tritium.build_child < request.json > reply.json

request: {"model": path, "output_dir": path, "build": BuildConfig fields, "plugins": ["module:name"]}.
reply: {} or {"error": class, "message": text}.
What the build has to say goes to standard error.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tritium import errors
from tritium.config import BuildConfig
from tritium.errors import ConfigError, EngineError, TritiumError


def build_in_child(model: str | Path, config: BuildConfig, output_dir: Path, *, plugins: Sequence[object] = ()) -> None:
    """Run the build in a child process and wait. A designed error of the child is raised here as the same class.

    plugins: as "module:name". A `ConfigError` for anything else: an object cannot reach the other process.
    """
    for plugin in plugins:
        if not isinstance(plugin, str):
            raise ConfigError(
                f"plugin {getattr(plugin, 'name', plugin)!r} is an object, which the building process cannot have: "
                "name it as 'module:name', or build the engine first: tritium.build(..., plugins=[...])"
            )
    request = {
        "model": str(model),
        "output_dir": str(output_dir),
        "build": dataclasses.asdict(config),
        "plugins": list(plugins),
    }
    child = subprocess.run(
        # -P: the working directory, perhaps a model's, is no place to import from
        [sys.executable, "-P", "-m", "tritium.build_child"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        reply = json.loads(child.stdout)
    except json.JSONDecodeError:
        raise EngineError(f"building {model} failed: the compiler ended with exit code {child.returncode}") from None
    if "error" in reply:
        kind = getattr(errors, reply["error"], EngineError)
        raise kind(reply["message"])


def main() -> int:
    """The child: one request from standard input, one reply to standard output."""
    from tritium.compiler import build  # noqa: PLC0415 - only a process that builds may load the compiler
    from tritium.runtime.gpu.device import check_device  # noqa: PLC0415 - a server's own process never loads torch

    request = json.load(sys.stdin)
    request["build"]["disabled_passes"] = tuple(request["build"]["disabled_passes"])
    reply = {}
    try:
        config = BuildConfig(**request["build"])
        check_device(config.device, config.tensor_parallel)  # what this builds is run here
        build(request["model"], config, output_dir=request["output_dir"], plugins=request["plugins"])
    except TritiumError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(reply))
    return 1 if reply else 0


if __name__ == "__main__":
    raise SystemExit(main())
