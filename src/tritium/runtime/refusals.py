"""What `Scheduler.add` refuses, and why: one bad request is told so at once and touches nobody else."""

from tritium.errors import RequestError, RequestTooLarge
from tritium.runtime.kv_manager import KVManager
from tritium.runtime.request import Request, RequestStatus
from tritium.runtime.scheduler_config import SchedulerConfig


def refuse_unless_runnable(request: Request, config: SchedulerConfig) -> None:
    """Raise unless it is a new request whose prompt has a token, only known ones, and leaves room for one output."""
    name, limit = f"request {request.request_id!r}", config.max_model_len - 1
    if request.status is not RequestStatus.WAITING:
        raise RequestError(f"{name} is already {request.status.value}: make a new Request to run it again")
    if not request.token_ids:
        raise RequestError(f"{name}: the prompt is empty; it needs at least one token")
    if request.num_tokens > limit:
        raise RequestTooLarge(
            f"{name}: the prompt has {request.num_tokens} tokens; max_model_len={config.max_model_len} leaves room for "
            f"at most {limit} and one output token"
        )
    if config.vocab_size is not None and (largest := max(request.token_ids)) >= config.vocab_size:
        raise RequestError(
            f"{name}: prompt token id {largest} at position {request.token_ids.index(largest)} is out of range: the "
            f"model has {config.vocab_size} tokens"
        )
    if config.vocab_size is not None:
        _refuse_unknown_ids(request, config.vocab_size)


def _refuse_unknown_ids(request: Request, vocab_size: int) -> None:
    """Raise unless every token id that the parameters name is one of the model's."""
    params = request.params
    named = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
    }
    for name, token_ids in named.items():
        if token_ids and (largest := max(token_ids)) >= vocab_size:
            raise RequestError(
                f"request {request.request_id!r}: {name} has token id {largest}; the model's ids are 0 to "
                f"{vocab_size - 1}"
            )


def most_total_tokens(request: Request, config: SchedulerConfig) -> int:
    """Prompt and outputs at most: `max_tokens` outputs, or as many as `max_model_len` leaves."""
    wanted = request.params.max_tokens
    room = config.max_model_len - request.num_prompt_tokens
    return request.num_prompt_tokens + (room if wanted is None else min(room, wanted))


def refuse_unless_fitting(request: Request, kv: KVManager) -> None:
    """Raise unless it could run up to its `max_total_tokens` if it had all blocks; the last output needs no slot."""
    needed, usable = kv.peak_blocks(request.max_total_tokens - 1, chunk=1), kv.pool.num_usable
    if needed > usable:
        num_outputs = request.max_total_tokens - request.num_prompt_tokens
        raise RequestTooLarge(
            f"request {request.request_id!r} could never run: its prompt of {request.num_prompt_tokens} tokens and up "
            f"to {num_outputs} output tokens need {needed} KV blocks of {kv.block_size} tokens, the cache "
            f"has {usable}; lower max_tokens, shorten the prompt or raise kv_cache_memory"
        )
