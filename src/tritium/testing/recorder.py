"""Runs requests through a real scheduler and executor, keeping the logits of every sampled position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.kernels.communicator import Communicator
from tritium.runtime.assemble import make_scheduler
from tritium.runtime.executor import Executor
from tritium.runtime.request import Request, SampledToken
from tritium.runtime.scheduler import Scheduler
from tritium.sampling_params import SamplingParams

LogitsByPosition = dict[int, torch.Tensor]


@dataclass
class Recorder:
    """One executor, kept over several runs; each run gets a scheduler of its own over the same KV cache.

    Greedy and seeded sampling both work; `logits` maps request id and number of tokens known to a float row [V].
    """

    engine: Engine
    config: RuntimeConfig
    communicator: Communicator | None = None
    executor: Executor = field(init=False)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.executor = Executor(self.engine, self.config, communicator=self.communicator)
        self.scheduler = make_scheduler(self.engine, self.config, self.executor)

    def run(
        self, requests: Sequence[Request], after_step: Callable[["Recorder", int], None] = lambda recorder, step: None
    ) -> dict[str, LogitsByPosition]:
        """Run all to their end. `after_step` may add and abort requests; what it adds is recorded too."""
        logits: dict[str, LogitsByPosition] = {}
        for request in requests:
            self.scheduler.add(request)
        step = 0
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            tokens: list[SampledToken] = []
            if batch.sequences:
                prepared = self.executor.prepare(batch)
                self.executor.launch(prepared)
                sampled = [s for s in batch.sequences if s.is_sampled]
                if sampled:
                    rows = self.executor.logits(prepared).clone()
                    for sequence, row in zip(sampled, rows, strict=True):
                        request = sequence.request
                        logits.setdefault(request.request_id, {})[request.num_tokens] = row
                for token in self.executor.sample(prepared):
                    assert isinstance(token, SampledToken), token
                    tokens.append(token)
            self.scheduler.update(batch, tokens)
            after_step(self, step)
            step += 1
            assert step < 100_000, "the scheduler makes no progress"
        return logits


def greedy_request(request_id: str, prompt: list[int], max_tokens: int, **more: object) -> Request:
    """A request that ends after exactly max_tokens likeliest tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=prompt, params=params, **more)  # type: ignore[arg-type]


def assert_bit_equal(found: dict[str, LogitsByPosition], expected: dict[str, LogitsByPosition]) -> None:
    """Every position of every expected request is there, with the same bits."""
    for request_id, rows in expected.items():
        assert found[request_id].keys() == rows.keys(), f"{request_id}: other positions were sampled"
        for position, row in rows.items():
            same = torch.equal(found[request_id][position], row)
            gap = (found[request_id][position].float() - row.float()).abs().max()
            assert same, f"{request_id} at {position} tokens: logits differ by up to {gap:.3g}"
