"""Small random encoders in which every tensor matters, written by transformers, which is also the oracle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from tritium.testing.tiny_tokenizers import write_directory

VOCAB_SIZE = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 80, "max_position_embeddings": 72, "num_labels": 3, "problem_type": "regression",
}  # fmt: skip
# Scores of "regression" are what the model puts out, unchanged: the strictest comparison.
ENCODERS: dict[str, dict[str, Any]] = {
    "BertModel": {},
    "BertForMaskedLM": {"hidden_act": "gelu_new"},
    "BertForSequenceClassification": {},
    "BertForTokenClassification": {"layer_norm_eps": 1e-5},
    "RobertaModel": {"type_vocab_size": 1, "pad_token_id": 1},
    "RobertaForSequenceClassification": {"type_vocab_size": 1, "pad_token_id": 4},
    "XLMRobertaForTokenClassification": {"type_vocab_size": 2, "pad_token_id": 1},
}
GAINS = {"query": 3.0, "key": 3.0}  # attention chooses


def make_encoder(
    path: Path, architecture: str, *, seed: int = 0, dtype: str = "float32", **config: Any
) -> tuple[Path, nn.Module]:
    """A model directory, and transformers' model of it in float32."""
    model_class = getattr(transformers, architecture)
    settings = {**SIZES, **ENCODERS[architecture], **config}
    model: Any = model_class(model_class.config_class(**settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.3 * noise + ("LayerNorm.weight" in name))
        elif "embeddings" in name:
            parameter.copy_(noise)
        else:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
            parameter.copy_(gain * noise * parameter.shape[1] ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path, model.float()


def encoder_directory(path: Path, architecture: str, **config: Any) -> tuple[Path, nn.Module]:
    """`make_encoder` with a tokenizer of words beside it."""
    path, model = make_encoder(path, architecture, **config)
    write_directory(path, word_tokenizer(), {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    return path, model


def write_sentence_files(path: Path, *, mode: str = "pooling_mode_mean_tokens", max_len: int = 40, **more: Any) -> None:
    """What makes a model directory one of sentence-transformers: pooled in one mode, normalised, texts of max_len."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, mode: True, **more}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_len, "do_lower_case": False}))


def reference(model: Any, ids: Sequence[int], types: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """What transformers puts out for one sequence: hidden states or scores, and its pooler's output if it has one."""
    is_headed = "For" in type(model).__name__ and "MaskedLM" not in type(model).__name__
    body = model if is_headed else model.base_model
    found = body(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    pooled = getattr(found, "pooler_output", None)
    return found[0][0].float(), None if pooled is None else pooled[0].float()


def word_tokenizer(*, types: tuple[int, int] = (0, 1)) -> Tokenizer:
    """Words w0, w1, ... with [CLS] and [SEP] around a text or a pair, as BERT has them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(VOCAB_SIZE - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    first, second = types
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[CLS]:{first} $A:{first} [SEP]:{first}",
        pair=f"[CLS]:{first} $A:{first} [SEP]:{first} $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer
