"""Stateless modules on a GPU: each equals the module run by torch on a CPU, and what lies on the GPU stays there.

Where there is no GPU, one is made up.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritium import OptimizationProfile, build
from tritium.errors import EngineError
from tritium.testing.fake_cuda import FakeStream, pretend_to_have_a_gpu
from tritium.testing.stateless_models import STATELESS, inputs_for

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
PROFILE = OptimizationProfile(min=1, opt=2, max=9)


@pytest.fixture(autouse=True)
def _whole_fp32() -> Iterator[None]:
    """Convolutions in fp32 and not, as is torch's default, in TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def expected_of(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = module(**inputs)
    return found if isinstance(found, dict) else {"output": found}


@pytest.mark.parametrize("name", STATELESS)
def test_every_batch_equals_torch_from_either_side(
    name: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = STATELESS[name]().eval()
    example: Any = inputs_for(module, 3)
    engine = build(module, example_inputs=example, output_dir=tmp_path / "e", profile=PROFILE, device="cuda")
    if not HAS_GPU:  # now: torch.export knows torch.cuda's own functions
        pretend_to_have_a_gpu(monkeypatch.setattr)
    for batch in (1, 2, 9):
        inputs = inputs_for(module, batch)
        expected, found = expected_of(module, inputs), engine.run(**inputs)
        with torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU else nullcontext():
            on_gpu = engine.run(**{name: tensor.to(device) for name, tensor in inputs.items()})
            copies = {name: tensor.clone() for name, tensor in on_gpu.items()}
        torch.cuda.synchronize()
        for output, value in expected.items():
            assert found[output].device.type == "cpu" and on_gpu[output].device.type == device.type
            torch.testing.assert_close(found[output], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(copies[output].cpu(), value, rtol=1e-4, atol=1e-5)


class Chooser(nn.Module):
    """Rows of x by their numbers."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return torch.gather(x, 1, rows) * 2


@pytest.mark.skipif(not HAS_GPU, reason="torch on a CPU checks by itself")
def test_an_index_that_does_not_exist_is_an_error_and_the_gpu_goes_on(tmp_path: Path) -> None:
    example: Any = {"x": torch.randn(2, 5), "rows": torch.zeros(2, 3, dtype=torch.int64)}
    engine = build(Chooser(), example_inputs=example, output_dir=tmp_path / "e", device="cuda")
    x, rows = torch.randn(2, 5), torch.tensor([[4, 0, 1], [2, 3, 4]])
    for wrong in (5, -1):
        with pytest.raises(EngineError, match=r"step aten.gather.default failed: an index is outside 0 to 4"):
            engine.run(x=x, rows=torch.full((2, 3), wrong))
    torch.testing.assert_close(engine.run(x=x, rows=rows)["output"], x.gather(1, rows) * 2)


def test_a_step_that_fails_is_waited_for_before_its_inputs_may_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example: Any = {"x": torch.randn(2, 5), "rows": torch.zeros(2, 3, dtype=torch.int64)}
    engine = build(Chooser(), example_inputs=example, output_dir=tmp_path / "e", device="cuda")
    if not HAS_GPU:
        pretend_to_have_a_gpu(monkeypatch.setattr)
    stream: Any = torch.cuda.Stream if HAS_GPU else FakeStream
    calls, wait = [], stream.synchronize
    with engine:
        expected = engine.run(**example)["output"]
        runner = engine._runner._runner
        run = runner.run

        def fail(*_: object) -> None:
            calls.append("failed")
            raise EngineError("a step failed")

        monkeypatch.setattr(runner, "run", fail)
        monkeypatch.setattr(stream, "synchronize", lambda of: (calls.append("waited"), wait(of)))
        with pytest.raises(EngineError, match="a step failed"):
            engine.run(**example)
        assert calls == ["failed", "waited"]
        monkeypatch.setattr(runner, "run", run)
        assert torch.equal(engine.run(**example)["output"], expected) and calls == ["failed", "waited"]
