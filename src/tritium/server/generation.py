"""One HTTP request as requests to the engine: every prompt n times, outputs merged as they come."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from tritium.errors import EngineUnavailable, TritiumError
from tritium.server.api_error import ApiError
from tritium.server.arrivals import MAX_WAITING, Arrivals
from tritium.server.connection import Event
from tritium.server.openai_request import Common
from tritium.server.service import Service
from tritium.wire import Output, TokenLogprob


class Finished(NamedTuple):
    """One choice, whole."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str


class Generation:
    """Choice number i * n + j is answer j to prompt i. usage: counts so far, as OpenAI gives them."""

    def __init__(self, service: Service, prompts: Sequence[list[int]], params: dict[str, Any], request: Common) -> None:
        self._service = service
        self._prompts = prompts
        self._params = params
        self._request = request
        self._unfinished: dict[str, list[int]] = {}  # by request id, its prompt's index and its unfinished answers
        self._arrivals = Arrivals(MAX_WAITING if request.stream else None)
        self._num_tokens = [0] * (len(prompts) * request.n)
        self._num_cached = 0

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """(choice, what is new of it), as it comes. Closing it early aborts what is unfinished.

        Raises `ApiError` for a request that was refused or failed; nothing of the others follows.
        """
        try:
            self._submit_all()
            while self._unfinished:
                output = await self._next()
                index = self._unfinished[output.request_id][0] * self._request.n + output.sample_index
                self._num_tokens[index] += len(output.token_ids)
                if output.finish_reason is not None:
                    self._finish(index, output)
                yield index, output
        finally:
            for request_id, (_, num_answers) in self._unfinished.items():
                self._service.client.abort(request_id)
                self._service.metrics.note_aborts(num_answers)

    async def events(
        self, head: Event, events_of: Callable[[int, Output], Iterable[Event]], *, has_usage: bool
    ) -> AsyncIterator[Event | None]:
        """A stream's events: those of each output, then perhaps the usage; an error is the last event, then None."""
        try:
            async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
                async for index, output in outputs:
                    for event in events_of(index, output):
                        yield event
        except ApiError as error:
            yield error.body()
            yield None
            return
        if has_usage:
            yield {**head, "choices": [], "usage": self.usage}

    async def _next(self) -> Output:
        try:
            return await self._arrivals.get()
        except TritiumError as error:
            raise ApiError.of(error) from error

    async def whole(self) -> list[Finished]:
        """Every choice, when all are finished."""
        parts: list[list[Output]] = [[] for _ in self._num_tokens]
        async with aclosing(self.outputs()) as outputs:  # type: ignore[type-var]
            async for index, output in outputs:
                parts[index].append(output)
        return [
            Finished(
                "".join(part.text for part in some),
                [token_id for part in some for token_id in part.token_ids],
                [token for part in some for token in part.logprobs],
                some[-1].finish_reason or "stop",
            )
            for some in parts
        ]

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`: each prompt counts once, whatever n is."""
        num_prompt, num_output = sum(map(len, self._prompts)), sum(self._num_tokens)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }

    def check_room(self) -> None:
        """Raises `ApiError` unless the server would take it now: a stream's status is sent before its first output."""
        self._service.check_room(len(self._num_tokens))

    def _submit_all(self) -> None:
        service, n = self._service, self._request.n
        self.check_room()
        for index, prompt in enumerate(self._prompts):
            try:
                request_id = service.client.submit(
                    self._arrivals,
                    prompt,
                    self._params,
                    num_answers=n,
                    is_streaming=self._request.stream,
                    priority=self._request.priority,
                    cache_salt=self._request.cache_salt,
                )
            except EngineUnavailable as error:
                raise ApiError.of(error) from error
            self._unfinished[request_id] = [index, n]

    def _finish(self, index: int, output: Output) -> None:
        """Count it; raise `ApiError` when it is no answer."""
        n = self._request.n
        self._unfinished[output.request_id][1] -= 1
        if output.refusal is not None or not self._unfinished[output.request_id][1]:
            del self._unfinished[output.request_id]
        if index % n == 0:
            self._num_cached += output.num_cached_tokens
        self._service.metrics.note_finish(output, len(self._prompts[index // n]), self._num_tokens[index])
        raise_unless_answer(output)


def raise_unless_answer(output: Output) -> None:
    """Raise `ApiError` for the last output of a request that was refused, failed or was ended."""
    if output.refusal is not None:
        code = "context_length_exceeded" if output.refusal == "RequestTooLarge" else None
        raise ApiError(400, output.error or "the request was refused", code=code)
    if output.finish_reason == "error":
        raise ApiError(500, f"the request failed: {output.error}")
    if output.finish_reason == "abort":
        raise ApiError(503, "the request was ended by the server", code="engine_unavailable")
