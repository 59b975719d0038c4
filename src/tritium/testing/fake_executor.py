"""An executor without a model, for tests of everything above it."""

from collections.abc import Callable

from tritium.runtime.request import Request, RowError, SampledToken, ScheduledBatch
from tritium.runtime.scheduler import Scheduler
from tritium.runtime.scheduler_config import SchedulerConfig

VOCAB_SIZE = 1000


def next_token(token_ids: list[int]) -> int:
    """What the fake model says after these tokens: depends on all of them, and on nothing else. Never below 10."""
    return 10 + sum((i + 1) * t for i, t in enumerate(token_ids)) * 31 % (VOCAB_SIZE - 10)


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """The fake model's greedy output."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeExecutor:
    """Checks what the scheduler promises, and answers with `next_token`.

    fails_on: request ids whose steps raise. nan_for: request ids whose logits are not numbers.
    before_step: called with each batch first.
    """

    def __init__(self) -> None:
        self.fails_on: set[str] = set()
        self.nan_for: set[str] = set()
        self.before_step: Callable[[ScheduledBatch], None] | None = None
        self.num_steps = 0

    def execute(self, batch: ScheduledBatch) -> list[SampledToken | RowError]:
        """One token per sampled sequence."""
        self.num_steps += 1
        if self.before_step is not None:
            self.before_step(batch)
        for sequence in batch.sequences:
            if sequence.request.request_id in self.fails_on:
                raise ArithmeticError(f"kernel failed for {sequence.request.request_id}")
            assert all(
                len(table) * 4 >= sequence.start + sequence.num_tokens for table in sequence.request.block_tables
            )
        return [self._token(s.request) for s in batch.sequences if s.is_sampled]

    def close(self) -> None:
        """It has nothing to give back."""

    def _token(self, request: Request) -> SampledToken | RowError:
        if request.request_id in self.nan_for:
            return RowError("the model's logits were not finite numbers")
        return SampledToken(next_token(request.token_ids), -0.5, ((1, -0.5), (2, -1.5)))


def make_scheduler(*, num_blocks: int = 65, max_num_seqs: int = 8, max_num_batched_tokens: int = 32) -> Scheduler:
    """A small scheduler: blocks of 4 tokens, sequences of up to 128."""
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=128,
            block_size=4,
            num_blocks=num_blocks,
            vocab_size=VOCAB_SIZE,
        )
    )
