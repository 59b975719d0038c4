"""A module becomes a plan: captured, optimised, lowered, a kernel for each step. Touches no weight and no file."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from tritium.config import BuildConfig
from tritium.engine.plan import Plan
from tritium.errors import CaptureError
from tritium.example_inputs import ModuleInputs
from tritium.graph import dump
from tritium.graph.capture import TOKEN_INPUTS, Captured, InputSpec, capture
from tritium.graph.foreign import Targets, registered
from tritium.kernels.plugin import Plugin, plugin_ops
from tritium.models.decoder import Decoder
from tritium.models.encoder import Encoder
from tritium.passes import pipeline
from tritium.passes.encoder_pipeline import optimise_encoder
from tritium.passes.lower import lower_encoder, lower_module
from tritium.passes.module_pipeline import optimise_module
from tritium.quant.schemes import WeightFormat
from tritium.resolve import learned_buffers
from tritium.runtime.kernel_choice import choose_kernels
from tritium.stage_clock import StageClock
from tritium.weights import recipes

ENCODER_INPUTS = {**TOKEN_INPUTS, "token_types": InputSpec(torch.int64)}


@dataclass(frozen=True)
class Compiled:
    """A model as a plan, before it is bound to weights.

    graph_text, graph_json: the final graph. constants: tensors the model brings along, by weight name.
    weights: recipes of the weights that passes have made, over the module's own tensors.
    """

    plan: Plan
    graph_text: str
    graph_json: str
    constants: dict[str, torch.Tensor]
    matches: dict[str, int]
    weights: dict[str, recipes.Recipe]


def compile_module(
    module: nn.Module,
    config: BuildConfig,
    *,
    dtype: torch.dtype | None = None,
    max_model_len: int | None = None,
    plugins: Sequence[Plugin] = (),
    stored: Mapping[str, WeightFormat] | None = None,
    calibration: Mapping[str, torch.Tensor] | None = None,
    clock: StageClock | None = None,
) -> Compiled:
    """Capture, optimise and lower `module` and choose its kernels.

    stored: the module's tensors that the checkpoint keeps quantised, and how. calibration: calibration tensors by name.
    """
    clock = clock or StageClock(None)
    with registered(plugin_ops(plugins)) as foreign:
        with clock.stage("capture"):
            captured = capture(module, dtype=dtype, max_model_len=max_model_len, blocks=_blocks(module))
        return _compile(
            captured, config, type(module).__name__, plugins, foreign, stored or {}, calibration or {}, clock
        )


def _compile(
    captured: Captured,
    config: BuildConfig,
    name: str,
    plugins: Sequence[Plugin],
    foreign: Targets,
    stored: Mapping[str, WeightFormat],
    calibration: Mapping[str, torch.Tensor],
    clock: StageClock,
) -> Compiled:
    with clock.stage("optimise"):
        optimised = pipeline.optimise(
            captured.graph,
            disabled=pipeline.left_out(config.disabled_passes, config.device),
            foreign=foreign,
            scheme=config.scheme,
            kv_dtype=config.kv_dtype,
            unquantized=config.unquantized,
            has_quantized_embedding=config.quantize_embedding,
            ranks=config.ranks,
            stored=stored if config.device == "cpu" else {},
            calibrated=calibration.keys(),
            device=config.device,
        )
        if not optimised.kv_groups:
            raise CaptureError(
                f"{name} has no causal attention. This version builds decoders only: write attention "
                "with tritium.ops.attention, or as torch's scaled_dot_product_attention(..., is_causal=True)"
            )
        if captured.restriction is not None:
            raise captured.restriction
    with clock.stage("lower"):
        plan = pipeline.to_plan(optimised)
    compiled = _compiled(plan, captured, optimised, config, clock, plugins)
    return dataclasses.replace(compiled, constants=compiled.constants | dict(calibration))


def compile_stateless(
    module: nn.Module, inputs: ModuleInputs, config: BuildConfig, *, clock: StageClock | None = None
) -> Compiled:
    """The same for a stateless module with these inputs. Raises `CaptureError` with the node that cannot be."""
    clock = clock or StageClock(None)
    with clock.stage("capture"):
        learned = learned_buffers(module)
        captured = capture(module, inputs=inputs.specs, is_by_name=inputs.is_by_name, learned=learned)
        if captured.restriction is not None:
            raise captured.restriction
    with clock.stage("optimise"):
        optimised = optimise_module(captured.graph, disabled=pipeline.left_out((), config.device))
    with clock.stage("lower"):
        plan = lower_module(optimised.graph, captured.outputs)
    return _compiled(plan, captured, optimised, config, clock)


def compile_encoder(module: nn.Module, config: BuildConfig, *, clock: StageClock | None = None) -> Compiled:
    """The same for an encoder."""
    assert isinstance(module, Encoder)
    clock = clock or StageClock(None)
    with clock.stage("capture"):
        captured = capture(module, inputs=ENCODER_INPUTS, blocks=_blocks(module))
    with clock.stage("optimise"):
        optimised = optimise_encoder(
            captured.graph,
            captured.outputs,
            module.row_outputs,
            disabled=pipeline.left_out(config.disabled_passes, config.device),
            scheme=config.scheme,
            unquantized=config.unquantized,
            has_quantized_embedding=config.quantize_embedding,
            device=config.device,
        )
    with clock.stage("lower"):
        plan = lower_encoder(optimised.graph, captured.outputs, module.config.vocab_size)
    return _compiled(plan, captured, optimised, config, clock)


def _blocks(module: nn.Module) -> str | None:
    """The list of blocks, of which equal ones are captured once; None for code that is not ours."""
    return "layers" if type(module).forward in (Decoder.forward, Encoder.forward) else None


def _compiled(
    plan: Plan,
    captured: Captured,
    optimised: pipeline.Optimised,
    config: BuildConfig,
    clock: StageClock,
    plugins: Sequence[Plugin] = (),
) -> Compiled:
    with clock.stage("kernels"):
        plan = _with_kernels(plan, config, plugins)
    return Compiled(
        plan=plan,
        graph_text=dump.to_text(optimised.graph),
        graph_json=dump.to_json(optimised.graph),
        constants=captured.constants | optimised.constants,
        matches=optimised.matches,
        weights=optimised.weights,
    )


def _with_kernels(plan: Plan, config: BuildConfig, plugins: Sequence[Plugin]) -> Plan:
    """The plan with the kernel that each step is to run on the configuration's device."""
    is_bitwise = config.resolved_invariance == "bitwise"
    chosen = zip(plan.steps, choose_kernels(plan, plugins, config.device, is_bitwise=is_bitwise), strict=True)
    return msgspec.structs.replace(plan, steps=tuple(msgspec.structs.replace(s, kernel=k.name) for s, k in chosen))


def compute_dtype(plan: Plan) -> str:
    """What a plan computes in: what its KV cache holds, unless that has 8 bits; then the dtype of its first output."""
    dtype = plan.kv_groups[0].dtype if plan.kv_groups else "int8"
    return plan.value(plan.results[0]).dtype if dtype in ("int8", "float8_e4m3fn") else dtype
