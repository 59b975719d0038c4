"""What a server and its engine process say to each other: msgpack messages over a private Unix socket pair.

    server → engine   `Start` once, then `Commands`: everything that came up since the last one
    engine → server   `Ready` or `Failed` once, then `Report`: everything of one step

A frame is its length (4 bytes, big-endian) and the message. Types are checked when a message is decoded; nothing in one
can be executed.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from tritium.errors import EngineError

MAX_FRAME = 256 << 20  # bytes; what does not fit into one goes in several
_LENGTH = struct.Struct(">I")
T = TypeVar("T")


class Start(msgspec.Struct, frozen=True, tag=True):
    """engine: the engine directory. runtime: the fields of `RuntimeConfig`."""

    engine: str
    runtime: dict[str, Any]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request. params: the fields of `SamplingParams` that are not at their defaults."""

    request_id: str
    token_ids: list[int]
    params: dict[str, Any]
    is_streaming: bool
    priority: int = 0
    cache_salt: str = ""


class Text(msgspec.Struct, frozen=True, array_like=True):
    """A text for an encoder. token_types: none, when all are 0."""

    token_ids: list[int]
    token_types: list[int] = []


class Encode(msgspec.Struct, frozen=True, tag=True):
    """Embed texts. Each is a sample of the request: its `Output` has its place among them as `sample_index`."""

    request_id: str
    texts: list[Text]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request; ignored when it is unknown or finished."""

    request_id: str


Command = Submit | Encode | Abort


class Commands(msgspec.Struct, frozen=True, tag=True):
    """In order. An empty one asks for a `Report`: the server's way to see that the engine is alive."""

    commands: Sequence[Command]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded. limits: what memory and configuration led to, `max_model_len` among them.

    A decoder's are the fields of `SchedulerConfig`, an encoder's are listed in `tritium.runtime.encoder_worker`.
    """

    limits: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not be loaded; of a rank, its last word. kind: a class of `tritium.errors`."""

    kind: str
    message: str


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability, and the likeliest ones in its place as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What a request gained. Each of its samples has a last one, with a finish_reason; a refused request only has one.

    refusal: the class of `RequestError` that kept it from starting. Times are seconds of the system's monotonic clock,
    which all processes share. embedding: float32, little-endian, of a text that was encoded.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    refusal: str | None = None
    num_cached_tokens: int = 0
    arrival: float | None = None
    first_token: float | None = None
    finished: float | None = None
    sample_index: int = 0
    embedding: bytes = b""


class Report(msgspec.Struct, frozen=True, tag=True):
    """outputs: of one step, or of commands only. stats: the fields of `SchedulerStats`, or those that an encoder has.

    num_batches: steps that computed something, since the start.
    """

    outputs: Sequence[Output]
    stats: dict[str, int]
    num_batches: int


_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE = msgspec.msgpack.Decoder(Start | Commands)
_TO_SERVER = msgspec.msgpack.Decoder(Ready | Failed | Report)


def frame(message: msgspec.Struct) -> bytes:
    """The message as it goes over the socket."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def frames(
    items: Sequence[T], message: Callable[[Sequence[T]], Commands | Report], on_too_large: Callable[[T, int], None]
) -> list[bytes]:
    """The items as few messages, in order. One that is too large for any is left out and told of, with its bytes."""
    data = frame(message(items))
    size = len(data) - _LENGTH.size
    if size <= MAX_FRAME:
        return [data]
    if len(items) == 1:
        on_too_large(items[0], size)
        return []
    middle = len(items) // 2
    return [*frames(items[:middle], message, on_too_large), *frames(items[middle:], message, on_too_large)]


def decode_for_engine(body: bytes) -> Start | Commands:
    """Raises `EngineError` for anything that is not such a message."""
    return _decode(_TO_ENGINE, body)


def decode_for_server(body: bytes) -> Ready | Failed | Report:
    """Raises `EngineError` for anything that is not such a message."""
    return _decode(_TO_SERVER, body)


class FrameBuffer:
    """Cuts a stream of bytes into the bodies of its frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes, in order. Raises `EngineError` for a length that no message has."""
        self._data += data
        bodies = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            if length > MAX_FRAME:
                raise EngineError(f"a frame of {length} bytes came from the other process; at most {MAX_FRAME} may")
            end = start + _LENGTH.size + length
            if end > len(self._data):
                break
            bodies.append(bytes(self._data[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return bodies


def _decode(decoder: msgspec.msgpack.Decoder, body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise EngineError(f"a message from the other process cannot be read: {error}") from error
