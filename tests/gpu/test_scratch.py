"""What kernels keep between launches: an engine's own, as the footprint says, and gone when the engine is closed.

Where there is no GPU, one is made up.
"""

import gc
from typing import Any

import pytest
import torch

from tritium import LLM, SamplingParams
from tritium.compiler import build
from tritium.engine.engine import Engine
from tritium.kernels.kernel import resolve
from tritium.models import parse_config
from tritium.runtime.kernel_choice import choose_kernels, specs_of
from tritium.testing.fake_cuda import pretend_to_have_a_gpu
from tritium.testing.tiny_configs import TINY_MODELS

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
PROMPTS = [[3, 5, 7], list(range(20))]
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "kv_cache_memory": 4 << 20}
PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A mixture of experts with linears of 8 bits; only sampled rows go through the last layer's experts."""
    model = parse_config(TINY_MODELS["mixtral"] | {"num_hidden_layers": 2}, "mixtral", dtype="float32")
    place = tmp_path_factory.mktemp("engine")
    return build(model, output_dir=place / "e", weights="dummy", device="cuda", scheme="w8a16", max_model_len=64)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        pretend_to_have_a_gpu(monkeypatch.setattr)


def context_of(llm: LLM) -> Any:
    return llm._thread.running_loop.executor._context  # type: ignore[attr-defined]


def memory() -> dict[int, int]:
    """Bytes of all memory that a tensor of this process lies in, by address."""
    gc.collect()
    storages = [
        x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type != "meta"
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_what_is_kept_is_what_the_rows_say_from_the_plan_alone(engine: Engine) -> None:
    from tritium.kernels.gpu.scratch import Batch

    with LLM(engine.path, **LIMITS) as llm:
        llm.generate(PROMPTS, PARAMS, use_progress=False)
        context = context_of(llm)
        kept = dict(context.scratch)
    plan, said = engine.plan, set()
    for step, kernel in zip(plan.steps, choose_kernels(plan, device="cuda"), strict=True):
        if kernel.scratch is not None:
            said |= resolve(kernel.scratch)(specs_of(step, plan.by_name), Batch(16, 4, (7, 5)))
    largest = {name: max(piece for piece in said if piece.name == name) for name in {piece.name for piece in said}}
    assert kept.keys() <= said and {"experts' hidden", "contexts' parts", "shared inputs' sums"} <= largest.keys()
    assert set(largest.values()) - kept.keys() <= {largest["shared inputs' sums"]}  # inputs of one group are not shared
    assert all(piece.num_bytes == tensor.nbytes for piece, tensor in kept.items())


def test_a_closed_engine_keeps_no_memory_though_somebody_still_has_it(engine: Engine) -> None:
    before = memory()
    llm = LLM(engine.path, **LIMITS)
    llm.generate(PROMPTS, PARAMS, use_progress=False)
    context = context_of(llm)
    kept = {tensor.data_ptr() for tensor in context.scratch.values()}
    assert kept and kept <= memory().keys()
    llm.close()
    left = {place: size for place, size in memory().items() if place not in before}
    assert not context.scratch and not kept & left.keys()
    assert sum(left.values()) < 64 << 10, left  # the host's arrays


def test_two_engines_of_a_process_share_no_scratch(engine: Engine) -> None:
    with LLM(engine.path, **LIMITS) as one, LLM(engine.path, **LIMITS) as other:
        assert one.generate(PROMPTS, PARAMS, use_progress=False) and other.generate(PROMPTS, PARAMS, use_progress=False)
        places = [{x.data_ptr() for x in context_of(llm).scratch.values()} for llm in (one, other)]
        assert all(places) and not places[0] & places[1]
