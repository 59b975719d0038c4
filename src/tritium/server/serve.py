"""Runs a server: the engine first, then the socket; ends in order on SIGTERM or Ctrl-C."""

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn

from tritium.config import RuntimeConfig, ServerConfig
from tritium.errors import ConfigError
from tritium.server.app import make_app
from tritium.server.http_protocol import MAX_HEAD_BYTES, GuardedProtocol, Patience, keep_looking
from tritium.server.service import Service

logger = logging.getLogger("tritium")

PATIENCE = Patience()
_BACKLOG = 2048  # connections that wait to be accepted
_OTHER_FILES = 64  # that the process has open beside its connections, at most


async def serve(
    engine: Path, runtime: RuntimeConfig, config: ServerConfig, on_ready: Callable[[Service, str], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C; then requests get `drain_seconds` to finish. A second Ctrl-C does not wait.

    on_ready: told once the socket listens, with the URL. Raises what the engine could not load, and `ConfigError` when
    the address cannot be listened at.
    """
    _allow_files(config.max_connections)
    listener = _listen(config)
    with listener:
        service = await Service.start(engine, runtime, config)
        try:
            server = _Server(
                uvicorn.Config(
                    make_app(service),
                    http=partial(GuardedProtocol, max_connections=config.max_connections),  # type: ignore[arg-type]
                    h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                    timeout_keep_alive=int(PATIENCE.keep_alive),
                    lifespan="off",
                    ws="none",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=config.drain_seconds,
                )
            )
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, server.handle_exit, number, None)
            listener.listen(_BACKLOG)
            on_ready(service, _url(listener))
            looking = asyncio.create_task(keep_looking(server.server_state.connections, PATIENCE))
            await server.serve(sockets=[listener])
            looking.cancel()
        finally:
            await service.client.close()


class _Server(uvicorn.Server):
    """uvicorn kills the process by the signal it got when it returns; there is still an engine to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _allow_files(max_connections: int) -> None:
    """Each connection is an open file. Raises `ConfigError` when the system does not allow so many."""
    needed = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"max_connections={max_connections} needs {needed} open files and this process may have {hard}: give "
                f"at most {hard - _OTHER_FILES}, or raise `ulimit -n`"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _listen(config: ServerConfig) -> socket.socket:
    """Before the engine is loaded: a port that is taken should be said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen at {config.host}:{config.port}: {error}; choose another --port") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
