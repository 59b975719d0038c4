"""The first rank's loop: before each step the other ranks are told what came up, and then all run the same step.

That they stay alike needs no more than that: scheduling is a function of what was submitted, in its order; a request's
seed is drawn here and sent along; and every rank chooses its tokens of logits with the same bits, which were gathered
or summed for all of them. A listener that fails, which only this rank has, ends its request before the next step.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future

from tritium.errors import EngineError, RequestError
from tritium.runtime.engine_loop import EngineLoop, error_text
from tritium.runtime.outputs import StepOutput
from tritium.runtime.ranks.messages import Drop, Renew, Take, Turn
from tritium.runtime.ranks.peers import Peers
from tritium.runtime.request import Request
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.stream import Listener, ListenerGone
from tritium.runtime.weight_updates import WeightUpdate

logger = logging.getLogger("tritium")

TOKENS_A_MESSAGE = 4 << 20  # of prompts, in messages that may have 256 MiB; a prompt's take up to five bytes each


class RanksLoop:
    """An `EngineLoop` that several processes run. Not thread-safe, like it."""

    def __init__(self, loop: EngineLoop, peers: Peers, close: Callable[[], None]) -> None:
        """loop: this rank's. close: ends the other ranks and the connection to them."""
        self._loop, self._peers, self._close = loop, peers, close
        self._commands: list[Take | Drop | Renew] = []
        self._num_tokens = 0  # of the prompts among them
        self._is_closing = False
        self._unheard: set[str] = set()  # unfinished requests whose listeners have failed

    @property
    def scheduler(self) -> Scheduler:
        """This rank's, and so everybody's."""
        return self._loop.scheduler

    @property
    def is_stalled(self) -> bool:
        """The last step found nothing that could run."""
        return self._loop.is_stalled

    @property
    def failure(self) -> EngineError | None:
        """Why the ranks were lost; nothing can be computed any more."""
        return self._peers.failure

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or unreported."""
        return self._loop.has_work

    def submit(self, request: Request, listener: Listener, *, is_streaming: bool = False) -> None:
        """As `EngineLoop.submit`. Raises `EngineError` once a rank is lost."""
        if self.failure is not None:
            raise EngineError(f"{self.failure}; open the model again")
        if request.params.logits_processors:
            raise RequestError(
                f"request {request.request_id!r}: logits_processors are code of this process, which the other ranks do "
                "not have: leave them out, or run the model without tensor_parallel"
            )
        take = Take.of(request, is_streaming=is_streaming)
        self._loop.submit(request, self._guarded(request.request_id, listener), is_streaming=is_streaming)
        self._unheard.discard(request.request_id)  # of an earlier one, which has ended, else this one were refused
        take.params["seed"] = request.params.seed  # perhaps drawn just now
        self._commands.append(take)
        self._num_tokens += request.num_prompt_tokens
        if self._num_tokens > TOKENS_A_MESSAGE:
            self._tell(is_whole=False)

    def abort(self, request_id: str) -> None:
        """As `EngineLoop.abort`."""
        if not self._loop.knows(request_id):  # it may be text that cannot even be sent
            return
        self._commands.append(Drop(request_id))
        self._loop.abort(request_id)

    def update_weights(self, update: WeightUpdate) -> None:
        """As `EngineLoop.update_weights`, on every rank; one that cannot is the end of all. Raises `EngineError` for
        weights that are in this process alone."""
        if self.failure is not None:
            raise EngineError(f"{self.failure}; open the model again")
        if update.path is None:
            raise EngineError(
                "a state dict is in this process alone, and other ranks need their parts of it: save it as safetensors "
                "and give update_weights the directory"
            )
        update.done.add_done_callback(self._check_update)
        self._loop.update_weights(update)
        self._commands.append(Renew(str(update.path), update.on_inflight))

    def step(self) -> list[StepOutput]:
        """As `EngineLoop.step`, on every rank. Once a rank is lost, every request ends with the reason; what is raised
        here is such a loss too, for the others went on."""
        outputs: list[StepOutput] = []
        try:
            unheard, self._unheard = self._unheard, set()
            for request_id in unheard:
                self.abort(request_id)
            if self.failure is None:
                self._tell(is_whole=True)
            if self.failure is None:
                outputs = self._loop.step()
        except Exception as error:
            logger.exception("the scheduler failed; every request ends with an error")
            self._peers.fail(EngineError(f"rank 0 failed: {error_text(error)}"))
        if self.failure is not None:
            outputs += self._loop.fail_all(self.failure)
        return outputs

    def fail_all(self, error: BaseException) -> list[StepOutput]:
        """As `EngineLoop.fail_all`, and the end of the other ranks, which would go on with these requests."""
        self._peers.fail(EngineError(f"rank 0 failed: {error_text(error)}"))
        return self._loop.fail_all(error)

    def let_go(self) -> None:
        """See `Loop.let_go`: the other ranks end, and what waits for one of them in a step does not wait any more."""
        self._peers.fail(EngineError("the engine was closed, and a step of its ranks did not end: they were ended"))

    def close(self) -> None:
        """As `EngineLoop.close`; the other ranks' processes end."""
        self._is_closing = True
        try:
            self._loop.close()
        finally:
            self._close()

    def _check_update(self, done: "Future[int]") -> None:
        """The other ranks have the new weights, or will: this one must not stay behind."""
        error = done.exception()
        if error is not None and not self._is_closing:
            self._peers.fail(EngineError(f"rank 0 could not take new weights: {error_text(error)}"))

    def _tell(self, *, is_whole: bool) -> None:
        """Send what came up since the last message."""
        commands, self._commands, self._num_tokens = self._commands, [], 0
        self._peers.send(Turn(commands, is_whole))

    def _guarded(self, request_id: str, listener: Listener) -> Listener:
        """The listener, whose failure the loop does not see: here it would end the request in the middle of a step."""

        def tell(output: StepOutput) -> None:
            try:
                listener(output)
            except Exception as error:
                if not isinstance(error, ListenerGone):
                    logger.exception("the listener of request %r failed; the request ends", request_id)
                self._unheard.add(request_id)

        return tell
