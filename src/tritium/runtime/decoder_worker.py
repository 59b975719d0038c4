"""The work of an engine process that generates text: an engine loop, its outputs as messages."""

import dataclasses
import logging
from typing import Any

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.errors import RequestError
from tritium.runtime.assemble import load_tokenizer
from tritium.runtime.loop import Loop
from tritium.runtime.make_request import RequestMaker
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks.launch import open_loop
from tritium.runtime.request import SampledToken
from tritium.sampling_params import SamplingParams
from tritium.wire import Abort, Command, Encode, Output, TokenLogprob

logger = logging.getLogger("tritium")


class DecoderWorker:
    """Requests in, one step's outputs at a time out. All calls belong on one thread."""

    def __init__(self, loop: Loop, maker: RequestMaker) -> None:
        self._loop = loop
        self._maker = maker
        self._outputs: list[StepOutput] = []

    @classmethod
    def load(cls, engine: Engine, config: RuntimeConfig) -> "DecoderWorker":
        """Raises what the engine's tokenizer, memory or kernels raise."""
        tokenizer = load_tokenizer(engine)
        loop = open_loop(engine, config, tokenizer)
        return cls(loop, RequestMaker(tokenizer, engine.manifest.eos_token_ids, engine.path))

    @property
    def limits(self) -> dict[str, Any]:
        """The fields of `SchedulerConfig`."""
        return dataclasses.asdict(self._loop.scheduler.config)

    @property
    def stats(self) -> dict[str, int]:
        """The fields of `SchedulerStats`."""
        return self._loop.scheduler.stats._asdict()

    @property
    def has_work(self) -> bool:
        """True while requests are unfinished, and once there is nothing more to do but to end."""
        return self._loop.has_work or self._loop.failure is not None

    @property
    def is_stalled(self) -> bool:
        """True when requests wait and none of them can run."""
        return self._loop.is_stalled

    def apply(self, command: Command) -> None:
        """Take a request, or end one. A request that cannot be taken has a refusal as its only output. Raises why the
        loop can do nothing any more."""
        if self._loop.failure is not None:
            raise self._loop.failure
        if isinstance(command, Abort):
            self._loop.abort(command.request_id)
            return
        try:
            if isinstance(command, Encode):
                raise RequestError(
                    f"request {command.request_id!r} asks for embeddings of {len(command.texts)} texts: this engine "
                    "generates text and is no encoder; ask one that is, or for completions"
                )
            request = self._maker.make(
                command.request_id,
                command.token_ids,
                SamplingParams(**command.params),
                priority=command.priority,
                cache_salt=command.cache_salt,
            )
            self._loop.submit(request, self._outputs.append, is_streaming=command.is_streaming)
        except RequestError as error:
            self._outputs.append(StepOutput(command.request_id, "", (), finish_reason="error", refusal=error))

    def step(self) -> bool:
        """Compute one batch; False when nothing could run. Raises why the loop can do nothing any more, when all its
        requests have ended."""
        if self._loop.failure is not None and not self._loop.has_work:
            raise self._loop.failure
        try:
            self._loop.step()
        except Exception as error:  # the process outlives whatever one step does
            logger.exception("the scheduler failed; every request ends with an error")
            self._loop.fail_all(error)
        return not self._loop.is_stalled

    def take_outputs(self) -> list[Output]:
        """What there is since the last call."""
        outputs = [_wire_output(output) for output in self._outputs]
        self._outputs.clear()
        return outputs


def _wire_output(output: StepOutput) -> Output:
    timings = output.timings
    return Output(
        request_id=output.request_id,
        text=output.text,
        token_ids=list(output.token_ids),
        logprobs=[_wire_logprob(token) for token in output.logprobs],
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        error=str(output.refusal) if output.refusal is not None else output.error,
        refusal=type(output.refusal).__name__ if output.refusal is not None else None,
        num_cached_tokens=output.num_cached_tokens,
        arrival=timings.arrival if timings else None,
        first_token=timings.first_token if timings else None,
        finished=timings.finished if timings else None,
        sample_index=output.sample_index,
    )


def _wire_logprob(token: SampledToken) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, list(token.top_logprobs))
