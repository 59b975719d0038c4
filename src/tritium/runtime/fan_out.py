"""One request that wants several samples of its prompt: its children, and how their outputs become its own.

Each child is an ordinary request with a seed of its own (`child_seed`): it samples, stops, is preempted and fails
alone, and its tokens are those of a single request with that seed. The first child starts at once; the others wait
until it has computed the prompt and then find its blocks in the prefix cache, so that the prompt is computed and stored
once (its last, partly filled block apart; without prefix caching each computes it).
"""

import dataclasses
from functools import partial

from tritium.runtime.outputs import StepOutput
from tritium.runtime.request import Request, SampledToken
from tritium.runtime.stream import Listener, ListenerGone
from tritium.sampling_params import child_seed


class FanOut:
    """The children of one request whose `params.num_samples` is above 1; its seed is set.

    children: the first has the parent's request_id. held: those that wait for the first to compute the prompt.
    is_ranked: more samples are drawn than returned; nothing is told before all are there.
    """

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.children = [_child(request, index) for index in range(request.params.num_samples)]
        self.held = self.children[1:]
        self.is_ranked = request.params.num_samples > request.params.n
        self._listener = listener
        self._finals: list[StepOutput] = []
        self._prompt_logprobs: tuple[SampledToken | None, ...] | None = None
        self._is_listener_gone = False

    @property
    def is_prompt_ready(self) -> bool:
        """True when the first child has computed the prompt, or will not."""
        return bool(self.children[0].output_token_ids) or self.children[0].is_finished

    @property
    def is_finished(self) -> bool:
        """True when every child has said its last."""
        return len(self._finals) == len(self.children)

    def listener_of(self, index: int) -> Listener:
        """The listener for a child."""
        return partial(self._hear, index)

    def _hear(self, index: int, output: StepOutput) -> None:
        if self._is_listener_gone:
            raise ListenerGone("it failed at another of this request's outputs")
        output = output._replace(request_id=self.request.request_id, sample_index=index)
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        if output.finish_reason is not None:
            self._finals.append(output)
        if not self.is_ranked:
            self._tell(output)
        elif self.is_finished:
            for rank, final in enumerate(sorted(self._finals, key=_rank)[: self.request.params.n]):
                logprobs = () if self.request.params.logprobs is None else final.logprobs
                prompt_logprobs = self._prompt_logprobs if rank == 0 else None
                self._tell(final._replace(sample_index=rank, logprobs=logprobs, prompt_logprobs=prompt_logprobs))

    def _tell(self, output: StepOutput) -> None:
        self._is_listener_gone = True  # unless it returns
        self._listener(output)
        self._is_listener_gone = False


def _child(request: Request, index: int) -> Request:
    params = request.params
    assert params.seed is not None
    logprobs = 0 if params.logprobs is None and params.num_samples > params.n else params.logprobs
    return dataclasses.replace(
        request,
        request_id=request.request_id if index == 0 else f"{request.request_id}[{index}]",
        params=dataclasses.replace(
            params,
            n=1,
            best_of=None,
            seed=child_seed(params.seed, index),
            logprobs=logprobs,
            prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        ),
    )


def _rank(output: StepOutput) -> tuple[bool, float, int]:
    """The likeliest whole output first; what failed last."""
    return output.finish_reason in ("error", "abort"), -(output.cumulative_logprob or 0.0), output.sample_index
