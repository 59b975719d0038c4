"""A model of transformers as the compiler captures it: unmodified code, its attention and experts as ops of ours.

transformers lets attention, masks and experts be replaced by name (`ALL_ATTENTION_FUNCTIONS`,
`ALL_MASK_ATTENTION_FUNCTIONS`, `ALL_EXPERTS_FUNCTIONS`). While a model is captured, `NAME` stands for functions that
call `ops.attention` and `ops.experts`. Models that compute attention themselves get a real mask, and
passes/recognise_scores.py finds the attention in what they compute. What a function cannot express is refused by name.

This is the edge to transformers (extra `[hf]`); nothing else of the package imports it.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tritium import ops
from tritium.errors import CaptureError
from tritium.models.hf_fields import ACTIVATION_NAMES

NAME = "tritium"
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
FAR = 1 << 17  # a position at which every sliding window shows
WINDOW = "tritium_window"  # attribute of a mask: keys a query sees, 0 for all


def for_capture(model: Any) -> nn.Module:
    """A copy of `model` on the meta device whose forward is (input_ids [T], positions [T]) -> logits [T, V].

    Its parameters have the model's names. Buffers, and tensors that modules keep as plain attributes, are copied with
    their values: they are constants. The model itself is left as it is.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    module: Any = copy.deepcopy(model, memo).eval()
    for owner in module.modules():
        for name, value in list(vars(owner).items()):
            if isinstance(value, Tensor):
                delattr(owner, name)
                owner.register_buffer(name, value, persistent=False)
    for config in (module.config, *vars(module.config).values()):
        if isinstance(config, transformers.PreTrainedConfig):
            vars(config).update(dict.fromkeys(_IMPLEMENTATIONS, NAME))
    parameters = inspect.signature(type(module).forward).parameters
    original = module.forward

    def forward(input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": input_ids_T[None], "use_cache": False, "return_dict": True}
        inputs["attention_mask"] = torch.ones_like(input_ids_T)[None]
        if "position_ids" in parameters:
            inputs["position_ids"] = positions_T[None]
        with _known_to_transformers():
            return original(**inputs).logits[0]

    module.forward = forward
    return module


def model_len(model: Any) -> int | None:
    """The longest sequence that config.json speaks of, in tokens; None when it does not."""
    config = model.config.get_text_config()
    lengths = [getattr(config, name, None) for name in LENGTHS]
    return next((length for length in lengths if isinstance(length, int) and length > 1), None)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """Ids that end a sequence, by the model's generation settings or its configuration."""
    settings = [getattr(model, "generation_config", None), model.config.get_text_config()]
    found = next((e for s in settings if (e := getattr(s, "eos_token_id", None)) is not None), ())
    ids = found if isinstance(found, (list, tuple)) else (found,)
    return tuple(sorted(i for i in ids if isinstance(i, int) and i >= 0))


_IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


@contextlib.contextmanager
def _known_to_transformers() -> Iterator[None]:
    """Inside, transformers finds our functions under `NAME`."""
    tables: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (ALL_ATTENTION_FUNCTIONS, _attention),
        (ALL_MASK_ATTENTION_FUNCTIONS, _mask),
        (ALL_EXPERTS_FUNCTIONS, _experts),
    )
    try:
        for table, function in tables:
            table._global_mapping[NAME] = function
        yield
    finally:
        for table, _ in tables:
            table._global_mapping.pop(NAME, None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: q [1, N, T, H], k and v [1, K, T, H] -> [1, T, N, H]."""
    window = getattr(attention_mask, WINDOW, "it is changed on its way to the attention")
    if attention_mask is None:
        window = 0
    if isinstance(window, str):
        _refuse(module, "attention mask", window)
    for name, option in options.items():
        if isinstance(option, Tensor) and name not in ("position_ids", "cache_position"):
            _refuse(module, "attention", f"{name} is a tensor, which tritium.ops.attention has no argument for")
    scale = options.get("scaling")
    is_causal = options.get("is_causal")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out_TNH = ops.attention(
        *(q, k, v),
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window,
        float(options.get("softcap") or 0.0),
    )
    return out_TNH[None], None


def _mask(
    *, q_length: int, mask_function: Callable[..., Tensor], dtype: torch.dtype, device: Any, **more: Any
) -> Tensor:
    """transformers' mask function: [1, 1, T, T], 0 where a query sees a key and the type's least number elsewhere.

    It has the attribute `WINDOW`: a number of keys, or why attention cannot use the mask (models make masks that no
    layer of theirs takes).
    """
    window = _window(mask_function)
    if isinstance(window, str):
        more |= {"q_length": q_length, "mask_function": mask_function, "dtype": dtype, "device": device}
        mask = eager_mask(**more)
        setattr(mask, WINDOW, window)
        return mask
    places = torch.arange(q_length, device=device)
    distance_TT = places[:, None] - places[None, :]
    is_seen = distance_TT >= 0
    if window:
        is_seen = is_seen & (distance_TT < window)
    mask = torch.where(is_seen, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)[None, None]
    setattr(mask, WINDOW, window)
    return mask


def _window(mask_function: Callable[..., Tensor]) -> int | str:
    """What the function says, tried out: keys that a query sees, itself included; 0 when it sees all before it.

    A text when it says something else.
    """
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        zero = torch.tensor(0)

        def sees(q: Tensor, k: Tensor) -> Tensor:
            return torch.as_tensor(mask_function(zero, zero, q, k)).expand(torch.broadcast_shapes(q.shape, k.shape))

        try:
            seen = int(sees(torch.tensor([FAR]), torch.arange(FAR + 2)).sum())
        except Exception as error:  # noqa: BLE001 (a foreign function may raise anything; the text is told)
            return f"it depends on the model's input ({type(error).__name__}: {str(error)[:200]})"
        window = 0 if seen == FAR + 1 else seen
        places = torch.arange(64)
        for start in (0, max(0, window - 32)):
            q, k = (places + start)[:, None], torch.arange(start + 80)[None, :]
            expected = (k <= q) & (k > q - window) if window else k <= q
            if not torch.equal(sees(q, k), expected):
                return "it is neither causal nor causal with a sliding window"
    return window


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function: x [T, D], experts and weights [T, J] -> [T, D]."""
    kinds = [name for name, cls in transformers.activations.ACT2CLS.items() if _is_made_by(module.act_fn, cls)]
    kind = next((ACTIVATION_NAMES[name] for name in kinds if name in ACTIVATION_NAMES), None)
    is_plain = module.has_gate and module.is_concatenated and not module.has_bias and not module.is_transposed
    if kind is None or not is_plain or getattr(module, "has_post_expert_norm", False):  # 5.17 has no such attribute
        _refuse(module, "experts", "they are not act(gate) * up with weights [E, 2F, D] and [E, D, F] and no bias")
    if module._apply_gate.__qualname__ != "_default_apply_gate":
        _refuse(module, "experts", "their gate is a function of the model's own")
    return ops.experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, kind)


def _is_made_by(function: nn.Module, made_by: Any) -> bool:
    """True when `function` is what transformers' table of activations has under an entry."""
    cls, options = made_by if isinstance(made_by, tuple) else (made_by, {})
    return type(function) is cls and all(getattr(function, name, value) == value for name, value in options.items())


def _refuse(module: nn.Module, what: str, why: str) -> NoReturn:
    raise CaptureError(f"{type(module).__name__}: its {what} cannot be compiled: {why}")
