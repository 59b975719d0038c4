"""A batch that an executor has written into its inputs."""

from dataclasses import dataclass

from tritium.runtime.batch import BatchLayout
from tritium.runtime.prompt_logprobs import ScoredPart


@dataclass(frozen=True)
class PreparedStep:
    """The batch as it lies in the inputs, the buckets that it runs in, and the parts of prompts that it scores."""

    layout: BatchLayout
    token_bucket: int
    row_bucket: int
    scored: list[ScoredPart]
