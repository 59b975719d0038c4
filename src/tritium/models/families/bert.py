"""BERT and RoBERTa encoders, bare and with heads. RoBERTa's positions start behind the row of its padding token."""

from dataclasses import dataclass
from typing import Any

from tritium.models.config import MAX_LAYERS
from tritium.models.encoder_config import EncoderConfig, Head, ScoreActivation
from tritium.models.families.family import Names
from tritium.models.families.places import RowsFrom
from tritium.models.hf_fields import Fields

MAX_LABELS = 1 << 16
# What CrossEncoder of sentence-transformers writes down, by the last word of its class.
ACTIVATIONS: dict[str, ScoreActivation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """A row: how config.json is read and where each tensor is; names, respelled and ignored as in `Family`."""

    architecture: str
    model_type: str
    head: Head
    names: Names
    respelled: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]

    def read(self, fields: Fields, *, has_pooler: bool) -> dict[str, Any]:
        """config.json -> keywords of EncoderConfig. has_pooler: the checkpoint has the tensors of one."""
        fields.refuse("is_decoder", (False,), "only bidirectional encoders are supported")
        fields.refuse("add_cross_attention", (False,), "cross-attention is not supported")
        fields.refuse("position_embedding_type", ("absolute",), "only absolute positions are supported")
        positions = fields.integer("max_position_embeddings", default=512)
        start = first_position(fields, self.model_type)
        if start >= positions:
            raise fields.error(
                "pad_token_id", f"is {start - 1}: {positions} position embeddings leave none for a token"
            )
        labels = _labels(fields) if self.head != "none" else ()
        return {
            "architecture": self.architecture,
            "vocab_size": fields.integer("vocab_size", default=30522 if self.model_type == "bert" else 50265),
            "hidden_size": fields.integer("hidden_size", default=768),
            "intermediate_size": fields.integer("intermediate_size", default=3072),
            "num_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS, default=12),
            "num_heads": fields.integer("num_attention_heads", high=1 << 14, default=12),
            "num_positions": positions - start,
            "position_offset": start,
            "num_token_types": fields.integer("type_vocab_size", default=2),
            "norm_eps": fields.number("layer_norm_eps", high=1.0, default=1e-12),
            "activation": fields.activation("hidden_act", default="gelu"),
            "head": self.head,
            "has_pooler": self.head == "none" and has_pooler,
            "labels": labels,
            "score_activation": _score_activation(fields, len(labels)),
        }


def first_position(fields: Fields, model_type: str) -> int:
    """The row of the position table that a sequence's first token has."""
    return 0 if model_type == "bert" else fields.integer("pad_token_id", low=0, default=1) + 1


def _labels(fields: Fields) -> tuple[str, ...]:
    """By `id2label`, else numbered; two when config.json says nothing, as in transformers."""
    named = fields.section("id2label")
    count = fields.integer("num_labels", high=MAX_LABELS, default=len(named.data) if named else 2)
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    found = [named.data.get(str(i)) for i in range(count)]
    if len(named.data) != count or not all(isinstance(label, str) for label in found):
        raise fields.error(
            "id2label", f"is {str(dict(named.data))[:200]}, expected a name for each of 0 to {count - 1}"
        )
    return tuple(map(str, found))


def _score_activation(fields: Fields, num_labels: int) -> ScoreActivation:
    """What the checkpoint's authors say, else sigmoid for one label or several at once, else softmax."""
    section = fields.section("sentence_transformers")
    nested = section.data.get("activation_fn") if section else None
    name, value = fields.get("sbert_ce_default_activation_function", default=nested)
    if value is not None:
        chosen = ACTIVATIONS.get(str(value).rpartition(".")[2])
        if chosen is None:
            raise fields.unsupported(name, value, f"scores go through {', '.join(ACTIVATIONS)}")
        return chosen
    problem = fields.get("problem_type", default=None)[1]
    if problem == "regression":
        return "identity"
    return "sigmoid" if num_labels == 1 or problem == "multi_label_classification" else "softmax"


def _names(prefix: str, head: Head, *, is_roberta: bool) -> Names:
    layer = f"{prefix}.encoder.layer.*"
    names: Names = {
        "embed_tokens": f"{prefix}.embeddings.word_embeddings",
        "embed_positions": f"{prefix}.embeddings.position_embeddings",
        "embed_types": f"{prefix}.embeddings.token_type_embeddings",
        "embed_norm": f"{prefix}.embeddings.LayerNorm",
        "layers.*.q_proj": f"{layer}.attention.self.query",
        "layers.*.k_proj": f"{layer}.attention.self.key",
        "layers.*.v_proj": f"{layer}.attention.self.value",
        "layers.*.o_proj": f"{layer}.attention.output.dense",
        "layers.*.attention_norm": f"{layer}.attention.output.LayerNorm",
        "layers.*.up_proj": f"{layer}.intermediate.dense",
        "layers.*.down_proj": f"{layer}.output.dense",
        "layers.*.mlp_norm": f"{layer}.output.LayerNorm",
        "pooler": f"{prefix}.pooler.dense",
        "classifier": "classifier",
    }
    if is_roberta and head == "sequence":
        names |= {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
    return names


def _row(kind: str, suffix: str, head: Head, *ignored: str) -> EncoderFamily:
    prefix = "bert" if kind == "Bert" else "roberta"
    return EncoderFamily(
        architecture=kind + suffix,
        model_type=prefix,
        head=head,
        names=_names(prefix, head, is_roberta=prefix == "roberta"),
        respelled=((f"{prefix}.", ""),),
        ignored=(rf"({prefix}\.)?embeddings\.(position_ids|token_type_ids)", *ignored),
    )


_BERT_POOLER, _ROBERTA_POOLER = r"(bert\.)?pooler\..*", r"(roberta\.)?pooler\..*"
_ROBERTAS = ("Roberta", "XLMRoberta")  # the same model with other vocabularies
ENCODERS: tuple[EncoderFamily, ...] = (
    _row("Bert", "Model", "none"),
    _row("Bert", "ForMaskedLM", "none", r"cls\..*"),
    _row("Bert", "ForPreTraining", "none", r"cls\..*"),
    _row("Bert", "ForSequenceClassification", "sequence"),
    _row("Bert", "ForTokenClassification", "token", _BERT_POOLER),
    *(_row(kind, "Model", "none") for kind in _ROBERTAS),
    *(_row(kind, "ForMaskedLM", "none", r"lm_head\..*") for kind in _ROBERTAS),
    *(_row(kind, "ForSequenceClassification", "sequence", _ROBERTA_POOLER) for kind in _ROBERTAS),
    *(_row(kind, "ForTokenClassification", "token", _ROBERTA_POOLER) for kind in _ROBERTAS),
)


def encoder_names(family: EncoderFamily, config: EncoderConfig) -> Names:
    """The family's names, with the position table as this model's offset has it."""
    path = family.names["embed_positions"]
    if not config.position_offset or not isinstance(path, str):
        return family.names
    return family.names | {"embed_positions": RowsFrom(path, config.position_offset)}


def find_encoder(fields: Fields) -> EncoderFamily | None:
    """The row for a config.json whose first architecture is an encoder's; None for any other."""
    architectures = fields.get("architectures", default=None)[1]
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return next((row for row in ENCODERS if row.architecture == first), None)


def encoder_named(config: EncoderConfig) -> EncoderFamily | None:
    """The row that `config.architecture` names."""
    return next((row for row in ENCODERS if row.architecture == config.architecture), None)
