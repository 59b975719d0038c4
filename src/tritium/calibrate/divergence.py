"""How far two engines of one model are apart on one text: a decoder's next tokens, an encoder's outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.calibrate.engine_logits import EngineLogits
from tritium.config import RuntimeConfig
from tritium.engine.engine import Engine
from tritium.runtime.encoder_request import EncoderRequest, Task
from tritium.runtime.encoder_runner import EncoderRunner


class Outputs:
    """What `engine`, a decoder or an encoder, makes of `window`: rows of numbers.

    rows: fp32; of a decoder one tensor [T, V] of logits; of an encoder [T, D] of hidden states, and [C] or [T, C] of
    scores where the model has some.
    """

    def __init__(self, engine: Engine, window: Sequence[int]) -> None:
        self._is_decoder = engine.manifest.kind == "decoder"
        if self._is_decoder:
            self.rows = [EngineLogits(engine, len(window)).logits(window)]
        else:
            self.rows = _encoder_rows(engine, window)

    def divergence(self, other: "Outputs") -> float:
        """Of `other` from these, at the worst row, in float64: nats of KL of a decoder's distributions; of an encoder
        the square of the error's norm over the row's own, which is a small error's size in nats too."""
        pairs = [(a.double(), b.double()) for a, b in zip(self.rows, other.rows, strict=True)]
        if self._is_decoder:
            [(p, q)] = [(torch.log_softmax(a, -1), torch.log_softmax(b, -1)) for a, b in pairs]
            return float((p.exp() * (p - q)).sum(-1).max())
        squares = [(a - b).square().sum(-1) / a.square().sum(-1).clamp_min(1e-300) for a, b in pairs]
        return float(torch.stack([square.max() for square in squares]).max())  # unlike Python's max it keeps NaN


def _encoder_rows(engine: Engine, window: Sequence[int]) -> list[Tensor]:
    config = RuntimeConfig(max_num_seqs=1, max_num_batched_tokens=len(window))
    runner = EncoderRunner(engine, config)
    tasks: list[Task] = ["token_embed"] if "hidden" in runner.outputs else []
    if "scores" in runner.outputs:
        is_by_row = engine.plan.value(engine.plan.outputs["scores"]).shape[0] == "R"
        tasks.append("classify" if is_by_row else "token_classify")
    ids, types = list(window), [0] * len(window)
    requests = [EncoderRequest(token_ids=ids, token_types=types, task=task, is_normalized=False) for task in tasks]
    return [runner.compute([request])[0] for request in requests]
