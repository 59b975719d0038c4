"""What the first rank's process and the others say to each other: msgpack messages over a private Unix socket pair.

first → other   `StartRank`, `Connect`, then a `Turn` for each step: what came up since the last one
other → first   `Loaded`, `Opened`, then `Chosen` now and then; or `Failed`, its last word
"""

import dataclasses
from typing import Any

import msgspec

from tritium.errors import RequestError
from tritium.runtime.request import Request
from tritium.runtime.weight_updates import OnInflight
from tritium.sampling_params import SamplingParams
from tritium.wire import Failed

_DEFAULTS = SamplingParams()
_PARAMS = tuple(f.name for f in dataclasses.fields(SamplingParams))


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """engine: the rank's engine directory, unless it knows one on its own machine. local_rank: among the ranks there.
    runtime: the fields of `RuntimeConfig`. plugins: as "module:name"."""

    engine: str
    rank: int
    num_ranks: int
    local_rank: int
    runtime: dict[str, Any]
    plugins: list[str]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The engine's files are whole. model, weights: what `describe_model` and `whole_weights` say of it."""

    model: str
    weights: dict[str, str]


class Connect(msgspec.Struct, frozen=True, tag=True):
    """All are there: meet at `store`, a file; with a port, at that address, on which the first machine is reached."""

    store: str
    port: int = 0


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The engine is open: turns can come."""


class Take(msgspec.Struct, frozen=True, tag=True):
    """Submit a request. params: the fields of `SamplingParams` that are not at their defaults."""

    request_id: str
    token_ids: list[int]
    params: dict[str, Any]
    is_streaming: bool
    priority: int
    eos_token_ids: tuple[int, ...]
    cache_salt: str
    bad_word_ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, request: Request, *, is_streaming: bool) -> "Take":
        """A request of which nothing is computed. Raises `RequestError` that names what cannot be sent."""
        given = {name: getattr(request.params, name) for name in _PARAMS}
        params = {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}
        if "logit_bias" in params:
            params["logit_bias"] = dict(params["logit_bias"])
        take = cls(
            request.request_id,
            list(request.prompt_token_ids),
            params,
            is_streaming,
            request.priority,
            request.eos_token_ids,
            request.cache_salt,
            request.bad_word_ids,
        )
        take._check()
        return take

    def _check(self) -> None:
        if _is_sendable(self):
            return
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "params"} | self.params
        for name, value in fields.items():
            if not _is_sendable(value):
                raise RequestError(
                    f"request {self.request_id!r}: {name} is {value!r:.200}, which cannot be sent to the other ranks: "
                    "give plain Python numbers, and text that UTF-8 can hold (no lone surrogates)"
                )

    def request(self) -> Request:
        """The same request, for another rank."""
        return Request(
            request_id=self.request_id,
            prompt_token_ids=self.token_ids,
            params=SamplingParams(**self.params),
            priority=self.priority,
            eos_token_ids=self.eos_token_ids,
            cache_salt=self.cache_salt,
            bad_word_ids=self.bad_word_ids,
        )


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Abort a request."""

    request_id: str


class Renew(msgspec.Struct, frozen=True, tag=True):
    """Take new weights, of the checkpoint at `path`."""

    path: str
    on_inflight: OnInflight


class Turn(msgspec.Struct, frozen=True, tag=True):
    """In this order, then one step; is_whole False: more of them come before it."""

    commands: list[Take | Drop | Renew]
    is_whole: bool = True


class Chosen(msgspec.Struct, frozen=True, tag=True):
    """After so many steps: a hash of every token they chose."""

    num_steps: int
    digest: int


def _is_sendable(value: object) -> bool:
    try:
        msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


TO_RANK: msgspec.msgpack.Decoder[StartRank | Connect | Turn] = msgspec.msgpack.Decoder(StartRank | Connect | Turn)
FROM_RANK: msgspec.msgpack.Decoder[Loaded | Opened | Chosen | Failed] = msgspec.msgpack.Decoder(
    Loaded | Opened | Chosen | Failed
)
