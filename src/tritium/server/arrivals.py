"""Outputs on their way from the engine to the answer of one HTTP request: a queue that does not grow without bound."""

import asyncio
from collections import deque

from tritium.errors import RequestError, TritiumError
from tritium.wire import Output

MAX_WAITING = 1 << 18  # tokens and alternatives to tokens of a stream that may wait, about 100 bytes each


class Arrivals:
    """Of one event loop. A client that does not read stops whoever takes outputs out; the engine does not wait for it.

    max_waiting: of a stream. An output that comes when so much waits is dropped, with all that wait, and there is only
    an error to get. None: the whole answer may wait, which was bounded when it was asked for.
    """

    def __init__(self, max_waiting: int | None = None) -> None:
        self._max_waiting = max_waiting
        self._waiting: deque[Output] = deque()
        self._size = 0
        self._end: TritiumError | None = None
        self._wake = asyncio.Event()

    def put(self, output: Output) -> bool:
        """False: too much waits, or it is over; the request should be aborted."""
        if self._max_waiting is not None and self._size > self._max_waiting:
            self._waiting.clear()
            self._size = 0
            self.end(RequestError("the answer was not read for some time and too much of it waits: read it faster"))
        if self._end is not None:
            return False
        self._waiting.append(output)
        self._size += _size(output)
        self._wake.set()
        return True

    def end(self, error: TritiumError) -> None:
        """Nothing more comes: `get` raises the error when it has given all that waits."""
        self._end = error
        self._wake.set()

    async def get(self) -> Output:
        """The next output. Raises the error that ended it all."""
        while not self._waiting:
            if self._end is not None:
                raise self._end
            self._wake.clear()
            await self._wake.wait()
        output = self._waiting.popleft()
        self._size -= _size(output)
        return output


def _size(output: Output) -> int:
    return 1 + len(output.token_ids) + sum(1 + len(token.top) for token in output.logprobs)
