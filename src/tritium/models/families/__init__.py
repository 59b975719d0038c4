"""The model table: one row per family. A row says how its config.json is read and how its tensors are named.

The rows stand with their readers, one file a group of kin. docs/add-a-model.md has the steps to add one.
"""

from tritium.errors import UnsupportedModel
from tritium.models.config import ModelConfig
from tritium.models.families.bloom import BLOOM
from tritium.models.families.falcon import FALCON
from tritium.models.families.family import Family
from tritium.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_MULTIMODAL
from tritium.models.families.gpt import GPT2, GPTJ
from tritium.models.families.gpt_neox import GPT_NEOX
from tritium.models.families.llama import LLAMA, MISTRAL, MIXTRAL
from tritium.models.families.opt import OPT
from tritium.models.families.phi import PHI3
from tritium.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from tritium.models.families.stablelm import STABLELM
from tritium.models.hf_fields import Fields

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI3, STABLELM),
    *(GEMMA2, GEMMA3, GEMMA3_MULTIMODAL),
    *(GPT2, GPTJ, GPT_NEOX, FALCON, OPT, BLOOM),
)


def find_family(fields: Fields) -> Family:
    """The row for a config.json: by its first architecture, or by model_type when it names none."""
    architectures = fields.get("architectures", default=None)[1]
    known = ", ".join(family.architecture for family in FAMILIES)
    add = "to add one, write a row in tritium/models/families, or pass your own nn.Module to tritium.build"
    if architectures:
        if not isinstance(architectures, list) or not isinstance(architectures[0], str):
            raise fields.error("architectures", f"is {architectures!r}, expected a list of names")
        for family in FAMILIES:
            if family.architecture == architectures[0]:
                return family
        raise UnsupportedModel(f"{fields.where}: architecture {architectures[0]!r} is unknown; known: {known}; {add}")
    kind = fields.get("model_type")[1]
    for family in FAMILIES:
        if family.name == kind:
            return family
    raise UnsupportedModel(f"{fields.where}: model_type {kind!r} is unknown; known: {known}; {add}")


def family_named(config: ModelConfig) -> Family | None:
    """The row that `config.family` names; None for a model of your own."""
    return next((family for family in FAMILIES if family.name == config.family), None)
