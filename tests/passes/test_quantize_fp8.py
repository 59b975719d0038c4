"""The fp8 pass: what its recipes give; the kernels are in tests/gpu."""

import torch

from tritium.compiler import compile_module
from tritium.config import BuildConfig
from tritium.ops.fp8 import quantize_fp8
from tritium.testing.plain_models import PlainLlama
from tritium.weights.dummy import is_kept_of_dummies
from tritium.weights.recipe_json import from_json, to_json
from tritium.weights.recipes import Concat, evaluate, leaves
from tritium.weights.source import ModuleSource


def test_each_weight_is_the_numbers_and_scales_of_its_parts_one_after_the_other() -> None:
    torch.manual_seed(0)
    module = PlainLlama(size=128, num_heads=4, intermediate=288)
    compiled = compile_module(module, BuildConfig(scheme="fp8", device="cuda"))
    names = [step.args["weight_NK"].value for step in compiled.plan.steps if step.op == "linear_fp8"]
    assert any(isinstance(compiled.weights[name], Concat) for name in names)
    for name in names:
        trees = [from_json(to_json(compiled.weights[f"{name}{end}"])) for end in ("", "_scales")]
        parts = [module.get_parameter(leaf.name).detach() for leaf in leaves(trees[0])]
        numbers, scales = quantize_fp8(torch.cat(parts))
        found, found_scales = (evaluate(tree, ModuleSource(module)) for tree in trees)
        assert torch.equal(found.view(torch.uint8), numbers.view(torch.uint8)), name
        assert torch.equal(found_scales, scales.view(1, -1)), name
        assert not any(map(is_kept_of_dummies, trees))  # a GPU generates them itself
