"""The peer transformers, as it is by default."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertModel

from encoder import side


def encoders(model: Path, dtype: str) -> dict[str, side.Encode]:
    """dtype: one of torch's."""
    module: Any = BertModel.from_pretrained(model, dtype=getattr(torch, dtype), add_pooling_layer=False).eval()

    @torch.inference_mode()
    def hidden_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return module(ids, attention_mask=mask).last_hidden_state

    return side.padded_ways(hidden_of)


if __name__ == "__main__":
    side.run(encoders)
