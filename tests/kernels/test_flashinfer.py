"""FlashInfer's XQA as a row: only where the package is installed and fits, and given what its documentation asks for.

The package is a stand-in that computes what XQA's documentation says, from XQA's own arguments.
"""

import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tritium.engine import environment
from tritium.kernels.gpu import flashinfer_decode, supports
from tritium.kernels.kernel import LaunchContext, TensorSpec
from tritium.kernels.select import choose, valid_kernels, valid_tactics
from tritium.testing.attention_problems import Problem

ROW = "gpu.paged_attention_flashinfer"
SINGLES = [(1, 1), (1, 130), (1, 64), (1, 65), (1, 300)]


def xqa(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    workspace_buffer: torch.Tensor,
    semaphores: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    q_scale: float = 1.0,
    kv_layout: str = "NHD",
) -> None:
    """flashinfer.xqa.xqa of 0.7.2, its signature as far as it is used."""
    num_sequences, _, num_heads, head_size = q.shape
    assert all(x.is_contiguous() for x in (q, output, page_table, semaphores)) and kv_layout == "HND"
    assert (page_table.dtype, seq_lens.dtype, semaphores.dtype) == (torch.int32, torch.uint32, torch.uint32)
    assert not semaphores.view(torch.int32).any() and workspace_buffer.dtype == torch.uint8
    assert seq_lens.shape == (num_sequences, 1) and page_size in (16, 32, 64, 128)
    assert k_cache.shape[1:] == v_cache.shape[1:] == (num_kv_heads, page_size, head_size)
    for s in range(num_sequences):
        length = int(seq_lens[s, 0])
        pages = page_table[s, : -(-length // page_size)].tolist()
        k, v = (torch.cat([x[p] for p in pages], 1)[:, :length].float() for x in (k_cache, v_cache))
        k, v = (x.repeat_interleave(num_heads // num_kv_heads, 0) for x in (k, v))
        scores = (k @ q[s, 0].float().unsqueeze(2)).squeeze(2) * q_scale / head_size**0.5
        output[s, 0] = (scores.softmax(1).unsqueeze(1) @ v).squeeze(1).to(output.dtype)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package whose kernel is `xqa` above."""
    module = ModuleType("flashinfer.xqa")
    module.xqa = xqa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", module)
    monkeypatch.setattr(supports, "has_flashinfer", lambda: True)
    flashinfer_decode._launcher.cache_clear()
    return module


def specs(**changes: Any) -> dict[str, Any]:
    """Attention of LLaMA-3 8B in bf16."""
    plain = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16, "window": 0, "softcap": 0.0}
    of = plain | changes
    head_size, dtype = of["head_size"], of["dtype"]
    return {
        "q_TNH": TensorSpec(dtype=dtype, shape=(None, of["num_heads"], head_size)),
        "cache_layer": TensorSpec(dtype=of.get("cache", dtype), shape=(None, 2, of["num_kv_heads"], None, head_size)),
        "window": of["window"],
        "softcap": of["softcap"],
        "alibi_slopes_N": of.get("slopes"),
    }


def names(args: dict[str, Any]) -> list[str]:
    return [kernel.name for kernel in valid_kernels("paged_attention", args, available={"gpu", "eager"})]


@pytest.mark.usefixtures("package")
def test_where_the_package_is_installed_its_row_is_one_to_choose_and_never_the_first() -> None:
    rows = valid_kernels("paged_attention", specs(), available={"gpu", "eager"})
    row = next(kernel for kernel in rows if kernel.name == ROW)
    assert rows[0].name == "gpu.paged_attention" and row.min_capability == (9, 0) and not row.is_invariant
    assert valid_tactics(row, specs()) == [{}, {"single_tokens": "own"}]


def test_where_the_package_is_missing_its_row_is_too_and_a_plan_that_names_it_runs_by_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supports, "has_flashinfer", lambda: False)
    assert ROW not in names(specs()) and "gpu.paged_attention" in names(specs())
    assert supports.flashinfer_attention(specs()) == "FlashInfer is not installed: pip install flashinfer-python"
    chosen = choose("paged_attention", specs(), available={"gpu", "eager"}, preferred=ROW)
    assert chosen.name == "gpu.paged_attention"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache": torch.float8_e4m3fn}, "q is torch.bfloat16, the cache torch.float8_e4m3fn"),
        ({"cache": torch.int8}, "the cache torch.int8; equal ones of 16 bits are known"),
        ({"dtype": torch.float32}, "q is torch.float32"),
        ({"window": 4096}, "it knows no window, cap or slopes"),
        ({"softcap": 50.0}, "it knows no window, cap or slopes"),
        ({"slopes": TensorSpec(dtype=torch.float32, shape=(32,))}, "it knows no window, cap or slopes"),
        ({"head_size": 80}, "32 heads of 80 over 8 kv heads; up to 16 of 64, 128 or 256 are known"),
        ({"num_heads": 71, "num_kv_heads": 1, "head_size": 64}, "71 heads of 64 over 1 kv heads"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_read_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    assert reason in (supports.flashinfer_attention(specs(**changes)) or "")
    assert ROW not in names(specs(**changes))


def bound(
    args: dict[str, Any], *, num_decodes: int = len(SINGLES)
) -> tuple[torch.Tensor, flashinfer_decode.Launch | None]:
    out = torch.full_like(args["q_TNH"], 77.0)
    return out, flashinfer_decode.bind(args, out, LaunchContext(num_decodes=num_decodes))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("shape", "page"), [((8, 2, 128), 16), ((4, 4, 64), 64), ((6, 1, 256), 128)])
def test_single_tokens_are_right_wherever_the_cache_lies_and_prompts_behind_them_are_left(
    shape: tuple[int, int, int], page: int
) -> None:
    problem = Problem.draw([context for _, context in SINGLES], *shape, torch.bfloat16)
    scaled = Problem([0.3 * q for q in problem.q], problem.k, problem.v)
    args = problem.args([*enumerate(SINGLES), (1, (5, 120))], block_size=page) | {"scale": 0.3 * shape[2] ** -0.5}
    out, run = bound(args)
    assert run is not None and not args["cache_layer"].is_contiguous() and run()
    for s, chunk in enumerate(SINGLES):
        wanted = scaled.dense(s, chunk, torch.float32)
        assert (out[s] - wanted[0]).norm() <= 0.004 * wanted.norm()
    assert (out[len(SINGLES) :] == 77).all()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("block_size", [4, 256])
def test_blocks_of_another_size_are_left_to_the_projects_own_kernel(block_size: int) -> None:
    problem = Problem.draw([1, 130, 64, 65, 300], 4, 2, 64, torch.bfloat16)
    assert bound(problem.args(list(enumerate(SINGLES)), block_size=block_size))[1] is None


@pytest.mark.usefixtures("package")
def test_queries_that_lie_in_a_wider_matrix_are_left_to_the_projects_own_kernel() -> None:
    args = Problem.draw([1, 130, 64, 65, 300], 4, 2, 64, torch.bfloat16).args(list(enumerate(SINGLES)))
    args["q_TNH"] = torch.cat([args["q_TNH"]] * 2, 1)[:, :4]
    assert bound(args)[1] is None


def test_a_package_that_cannot_be_compiled_is_said_once_and_replaced(
    package: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Ninja build failed.\nCould not find nvcc")

    package.xqa = fail  # type: ignore[attr-defined]
    args = Problem.draw([1, 130, 64, 65, 300], 4, 2, 64, torch.bfloat16).args(list(enumerate(SINGLES)))
    with caplog.at_level(logging.WARNING, logger="tritium"):
        assert bound(args)[1] is None and bound(args)[1] is None
    assert len(caplog.messages) == 1
    for part in (
        "XQA kernel cannot run here",
        "RuntimeError: Could not find nvcc",
        "own decode attention takes its place",
    ):
        assert part in caplog.messages[0]


def of_another_signature(q: torch.Tensor, kv_cache: torch.Tensor, page_table: torch.Tensor) -> None:
    """What a later FlashInfer may make of it."""


def raising(error: BaseException) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (of_another_signature, "TypeError: of_another_signature() got an unexpected keyword argument"),
        (raising(AttributeError("no attribute 'xqa_module'")), "AttributeError: no attribute 'xqa_module'"),
        (raising(AssertionError()), "AssertionError: no reason given"),
        (raising(subprocess.CalledProcessError(1, "ninja")), "CalledProcessError: Command 'ninja' returned non-zero"),
    ],
    ids=["another signature", "another module", "an assertion", "a build"],
)
def test_whatever_another_version_of_the_package_raises_an_engine_opens_and_says_which_one_it_wants(
    kernel: Any, reason: str, package: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    package.xqa = kernel  # type: ignore[attr-defined]
    args = Problem.draw([1, 130, 64, 65, 300], 4, 2, 64, torch.bfloat16).args(list(enumerate(SINGLES)))
    with caplog.at_level(logging.WARNING, logger="tritium"):
        assert bound(args)[1] is None and bound(args)[1] is None
    [said] = caplog.messages
    assert reason in said and "own decode attention takes its place; it needs flashinfer-python 0.7 with nvcc" in said


def test_the_extra_asks_for_the_series_of_the_package_that_is_known() -> None:
    [wanted] = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["flashinfer"]
    assert wanted == f"flashinfer-python>={flashinfer_decode._TESTED}.2,<0.8"


def test_times_count_only_beside_the_same_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(environment, "_driver", lambda: "580")
    monkeypatch.setattr(environment.metadata, "version", {"triton": "3.6.0", "flashinfer-python": "0.7.2"}.__getitem__)
    with_package = environment.gpu_environment()
    monkeypatch.setattr(environment, "_version", {"triton": "3.6.0"}.get)
    without = environment.gpu_environment()
    assert environment.differences(without, with_package) == "flashinfer was 'unknown', is '0.7.2'"
    assert environment.differences(with_package, without) == ""  # what named it is refused by name
