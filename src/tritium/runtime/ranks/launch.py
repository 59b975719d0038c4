"""Opens an engine's loop: in this process alone, or with a process for each other rank that shares the model."""

import dataclasses
import logging
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed

from tritium.config import RuntimeConfig, available_threads, host_and_port, rendezvous_secret
from tritium.engine.engine import Engine
from tritium.engine.manifest import is_engine
from tritium.errors import ConfigError, EngineError, TritiumError
from tritium.kernels.communicator import Communicator, LostRanks
from tritium.runtime.assemble import make_loop
from tritium.runtime.loop import Loop
from tritium.runtime.nccl import NcclCommunicator
from tritium.runtime.ranks.alike import describe_model, difference, whole_weights
from tritium.runtime.ranks.connect import connect, host_store
from tritium.runtime.ranks.loop import RanksLoop
from tritium.runtime.ranks.messages import Connect, Loaded, Opened, StartRank
from tritium.runtime.ranks.nodes import Door
from tritium.runtime.ranks.peers import COMMAND, Peers
from tritium.text.tokenizer import Tokenizer

logger = logging.getLogger("tritium")
T = TypeVar("T")


def open_loop(
    engine: Engine,
    config: RuntimeConfig,
    tokenizer: Tokenizer | None,
    *,
    plugins: Sequence[object] = (),
    command: Sequence[str] = COMMAND,
) -> Loop:
    """The loop of an engine, with all its memory. Call it on the thread that will run it.

    An engine of the first of several ranks has the others' beside it; each gets a process. plugins: what the engine was
    opened with. command: what runs such a process.

    Raises what a rank's engine, memory or kernels raise, `EngineError` when one of them is lost meanwhile.
    """
    num_ranks = engine.manifest.mapping.get("tensor_parallel", 1)
    if num_ranks == 1:
        return make_loop(engine, config, tokenizer)
    num_local = _ranks_of_a_node(config, num_ranks)
    config = _of_each(engine, config, num_local)
    starts = _starts(engine, config, num_ranks, num_local, plugins)
    peers = Peers(starts, command, _from_other_nodes(config, num_ranks, num_local))
    # also removed when the interpreter ends before this is done
    place = tempfile.TemporaryDirectory(prefix="tritium-ranks-", ignore_cleanup_errors=True)
    ranks: Communicator | None = None

    def close() -> None:
        if ranks is not None:
            ranks.close()
        peers.close()

    try:
        _check_alike(engine, peers.wait(Loaded))
        if config.rendezvous is None:
            path = f"{place.name}/store"
            peers.send(Connect(path))
            ranks = peers.unless_lost(
                _on_this_gpu(lambda: connect(engine, distributed.FileStore(path, num_ranks), 0, num_ranks))
            )
        else:
            host, _ = host_and_port(config.rendezvous)
            store = host_store(host, num_ranks)
            peers.send(Connect(host, store.port))
            ranks = peers.unless_lost(_on_this_gpu(lambda: connect(engine, store, 0, num_ranks, address=host)))
        if isinstance(ranks, NcclCommunicator):
            peers.on_failure = ranks.close
        loop = make_loop(engine, config, tokenizer, communicator=ranks, watch=peers)
        peers.wait(Opened)
    except BaseException as error:
        is_own = isinstance(error, TritiumError) and not isinstance(error, LostRanks)
        reason = peers.explain(error) if isinstance(error, Exception) and not is_own else error
        close()
        if reason is error:
            raise
        raise reason from error
    finally:
        place.cleanup()
    return RanksLoop(loop, peers, close)


def _on_this_gpu(call: Callable[[], T]) -> Callable[[], T]:
    """The call, for a thread that does not know which GPU is this one's."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        return call()

    return run


def _ranks_of_a_node(config: RuntimeConfig, num_ranks: int) -> int:
    if num_ranks % config.num_nodes:
        raise ConfigError(f"num_nodes={config.num_nodes}: {num_ranks} ranks are no whole number on each of them")
    return num_ranks // config.num_nodes


def _from_other_nodes(config: RuntimeConfig, num_ranks: int, num_local: int) -> dict[int, socket.socket]:
    """Wait for the ranks of other machines."""
    if config.rendezvous is None:
        return {}
    door = Door(host_and_port(config.rendezvous), rendezvous_secret())
    try:
        logger.warning("waiting at %s for ranks %d to %d", config.rendezvous, num_local, num_ranks - 1)
        return door.admit(range(num_local, num_ranks), num_ranks)
    finally:
        door.close()


def _of_each(engine: Engine, config: RuntimeConfig, num_local: int) -> RuntimeConfig:
    """The configuration of every rank. Raises `EngineError` when there are too few GPUs."""
    if engine.manifest.backend == "cuda":
        if (found := torch.cuda.device_count()) < num_local:
            raise EngineError(
                f"{engine.path.parent} is for {num_local} GPUs a machine, and torch finds {found} here: build it with "
                "a smaller tensor_parallel, or run it on more machines"
            )
        return config
    return dataclasses.replace(config, num_threads=config.num_threads or max(1, available_threads() // num_local))


def _starts(
    engine: Engine, config: RuntimeConfig, num_ranks: int, num_local: int, plugins: Sequence[object]
) -> list[StartRank]:
    if engine.manifest.mapping.get("rank", 0) != 0:
        raise EngineError(
            f"{engine.path} is rank {engine.manifest.mapping['rank']} of {num_ranks}: open the first rank's engine, or "
            "the directory of all"
        )
    for plugin in plugins:
        if not isinstance(plugin, str):
            raise ConfigError(
                f"plugin {getattr(plugin, 'name', plugin)!r} is an object, which other processes cannot have: name "
                "it as 'module:name'"
            )
    paths = [engine.path.absolute().parent / f"rank-{rank}" for rank in range(1, num_ranks)]
    for path in paths[: num_local - 1]:
        if not is_engine(path):
            raise EngineError(
                f"{path} is no engine: {engine.path} is rank 0 of {num_ranks}, and the others' are expected beside it; "
                f"build them with tensor_parallel={num_ranks} and no rank"
            )
    runtime, names = dataclasses.asdict(config), [str(plugin) for plugin in plugins]
    return [
        StartRank(str(path), rank, num_ranks, rank % num_local, runtime, names) for rank, path in enumerate(paths, 1)
    ]


def _check_alike(engine: Engine, others: list[Loaded]) -> None:
    """Raises `EngineError` when a rank has another model than the first."""
    own, weights = describe_model(engine), whole_weights(engine)
    for rank, other in enumerate(others, 1):
        name = difference(weights, other.weights)
        if other.model != own or name is not None:
            found = f"{own}; {other.model}" if other.model != own else f"{name} differs"
            say = "refit or build all ranks alike"
            raise EngineError(f"{engine.path} and rank {rank}'s engine are of different models: {found}: {say}")
