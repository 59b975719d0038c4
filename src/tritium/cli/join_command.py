"""`tritium join`: this machine's ranks of a model that several machines share. Ends by SIGTERM or Ctrl-C."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from tritium.build_child import build_in_child
from tritium.cli.options import fields_of
from tritium.cli.report import print_json, say
from tritium.config import BuildConfig, RuntimeConfig, check_int, rendezvous_secret
from tritium.engine.manifest import rank_directories, read_manifest
from tritium.engine.obtain import obtain_engine
from tritium.errors import ConfigError, EngineError

FIRST_DELAY, LONGEST_DELAY = 0.2, 30.0  # seconds before the ranks start again; doubled by each start that was short
SHORT_SECONDS = 60.0
_LOOK_SECONDS = 0.1


def run(*, model: str, node_rank: int, config: Mapping[str, Any], is_json: bool) -> None:
    """Build the engines on first use; start the ranks, and start them again when the others were lost."""
    nodes = RuntimeConfig(**fields_of(RuntimeConfig, config))
    if nodes.rendezvous is None:
        raise ConfigError("num_nodes=1: one machine has nobody to join; say --num-nodes and --rendezvous")
    check_int("node_rank", node_rank, 1, nodes.num_nodes - 1)
    rendezvous_secret()  # which the ranks read themselves
    plugins = config.get("plugins", ())
    path = obtain_engine(model, BuildConfig(**fields_of(BuildConfig, config)), partial(build_in_child, plugins=plugins))
    manifest = read_manifest(path)
    num_ranks = manifest.mapping.get("tensor_parallel", 1)
    if num_ranks == 1 or num_ranks % nodes.num_nodes:
        raise ConfigError(
            f"num_nodes={nodes.num_nodes}: {path} is for {num_ranks} ranks, no whole number on each; say "
            "--tensor-parallel, a multiple of it"
        )
    engines = rank_directories(path, manifest)
    if len(engines) != num_ranks:
        raise EngineError(f"{path} has not the engines of all {num_ranks} ranks beside it: build them without a rank")
    num_local = num_ranks // nodes.num_nodes
    ranks = range(node_rank * num_local, (node_rank + 1) * num_local)
    commands = [
        [*_PROCESS, nodes.rendezvous, str(rank), str(num_ranks), str(engines[rank])] for rank in ranks
    ]  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if is_json:
        print_json({"ranks": list(ranks), "rendezvous": nodes.rendezvous, "engines": [str(engines[r]) for r in ranks]})
    say(f"ranks {ranks[0]} to {ranks[-1]} of {num_ranks} come to {nodes.rendezvous}")
    delay = FIRST_DELAY
    while True:
        start = time.monotonic()
        _run_once(commands)
        delay = FIRST_DELAY if time.monotonic() - start > SHORT_SECONDS else min(2 * delay, LONGEST_DELAY)
        say(f"the ranks have ended; they come again in {delay:.1f} s")
        time.sleep(delay)


_PROCESS = (sys.executable, "-P", "-m", "tritium.runtime.ranks.process")


def _run_once(commands: list[list[str]]) -> None:
    """Until one of them ends: then all do."""
    processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2) for command in commands]
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(_LOOK_SECONDS)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
