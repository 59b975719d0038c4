"""Ranks on other machines: they come to the first rank's address, and each side proves to the other that it knows the
secret before anything it says is read.

    first → other   nonce
    other → first   rank, number of ranks, nonce, HMAC of all of these
    first → other   HMAC of both nonces

What follows is neither encrypted nor signed, like everything between the ranks: the network must be the ranks' own.
"""

import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Collection

from tritium.errors import ConfigError, EngineError

START_SECONDS = 600.0  # in which all come
_TRY_SECONDS = 0.2  # between two tries
_TALK_SECONDS = 5.0  # for one proof
_NONCE, _MAC = 32, 32
_NUMBERS = struct.Struct(">II")


class Door:
    """Where the other machines' ranks come in."""

    def __init__(self, address: tuple[str, int], secret: bytes) -> None:
        """Listen. Raises `ConfigError` when that is not possible there."""
        self._secret = secret
        try:
            self._listener = socket.create_server(address, backlog=64)
        except OSError as error:
            raise ConfigError(
                f"rendezvous={address[0]}:{address[1]} cannot be listened at: {error}; give an address of this machine "
                "and a free port"
            ) from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def admit(self, ranks: Collection[int], num_ranks: int, seconds: float = START_SECONDS) -> dict[int, socket.socket]:
        """Wait for all of `ranks`; their connections. Raises `EngineError` that names those who did not come."""
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + seconds
        while missing := sorted(set(ranks) - found.keys()):
            left = deadline - time.monotonic()
            self._listener.settimeout(max(0.01, left))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                for one in found.values():
                    one.close()
                names = ", ".join(map(str, missing))
                raise EngineError(
                    f"of {num_ranks} ranks these did not come within {seconds:g} s: {names}; run `tritium join` on "
                    "their machines, with the same rendezvous, secret and numbers"
                ) from None
            rank = self._rank_of(connection, num_ranks)
            if rank in missing:
                connection.settimeout(None)
                found[rank] = connection
            else:
                connection.close()
        return found

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()

    def _rank_of(self, connection: socket.socket, num_ranks: int) -> int | None:
        """Who it is; None for one that does not prove it."""
        connection.settimeout(_TALK_SECONDS)
        try:
            ours = secrets.token_bytes(_NONCE)
            connection.sendall(ours)
            numbers, theirs, proof = (_read(connection, size) for size in (_NUMBERS.size, _NONCE, _MAC))
            if not hmac.compare_digest(proof, _mac(self._secret, b"other", ours, theirs, numbers)):
                return None
            rank, count = _NUMBERS.unpack(numbers)
            connection.sendall(_mac(self._secret, b"first", theirs, ours))
            keep_alive(connection)
            return int(rank) if count == num_ranks else None
        except OSError:
            return None


def come(
    address: tuple[str, int], secret: bytes, rank: int, num_ranks: int, seconds: float = START_SECONDS
) -> socket.socket:
    """Connect to the first rank, as soon as it is there. Raises `EngineError` when it does not come, or is another."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(address, timeout=_TALK_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"rank 0 of {num_ranks} was not at {address[0]}:{address[1]} within {seconds:g} s: {error}; start "
                    "it"
                ) from error
            time.sleep(_TRY_SECONDS)
    try:
        theirs, ours = _read(connection, _NONCE), secrets.token_bytes(_NONCE)
        numbers = _NUMBERS.pack(rank, num_ranks)
        connection.sendall(numbers + ours + _mac(secret, b"other", theirs, ours, numbers))
        if not hmac.compare_digest(_read(connection, _MAC), _mac(secret, b"first", ours, theirs)):
            raise ConnectionError("it does not know the secret")
    except OSError as error:
        connection.close()
        raise EngineError(
            f"rank {rank} of {num_ranks} was not let in at {address[0]}:{address[1]}: {error}; give both sides the same"
            " secret, tensor_parallel and number of nodes"
        ) from error
    connection.settimeout(None)
    keep_alive(connection)
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Small messages go at once; a machine that is gone is noticed within half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _mac(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), hashlib.sha256)


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("it closed the connection")
        data += piece
    return data
