"""FlashInfer's decode attention as a row: right beside the project's own, for any batch and inside a graph.

Needs a GPU of capability 9.0 or newer and the package flashinfer-python, with nvcc or flashinfer-jit-cache.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tritium.kernels.kernel import LaunchContext
from tritium.testing.attention_problems import Problem, num_leading_singles

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10, 12)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a GPU of capability 9, 10 or 12"),
    pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs flashinfer-python"),
]
MIXED = [(1, 1), (1, 130), (1, 64), (1, 65), (1, 700), (17, 150), (70, 70), (1, 90)]


def bound(args: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, Any]:
    """The row's thunk for arguments on the GPU, with what it writes into."""
    from tritium.kernels.gpu import attention_flashinfer, flashinfer_decode

    num_sequences, num_tokens, _, num_decodes = args["batch_counts"].tolist()
    contexts = args["context_lens_S"][num_decodes:num_sequences].tolist()
    context = LaunchContext(
        num_decodes=changes.get("num_decodes", num_decodes),
        num_prefills=num_sequences - num_decodes,
        num_prefill_tokens=num_tokens - num_decodes,
        num_prefill_keys=sum(contexts),
        longest_prefill=max(contexts, default=0),
    )
    out = torch.full_like(args["q_TNH"], 77.0)
    assert flashinfer_decode.bind(args, out, context) is not None, "XQA could not be loaded: see the warning"
    return out, attention_flashinfer.bind(args, [out], context)


def compute(args: dict[str, Any]) -> torch.Tensor:
    out, run = bound({name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()})
    run()
    return out.cpu()


def check(problem: Problem, chunks: list, found: list[torch.Tensor]) -> None:
    """Root mean square error at most twice that of the textbook in the same dtype."""
    dtype = problem.q[0].dtype
    out = torch.cat(found)
    exact = torch.cat([problem.dense(*chunk, torch.float64) for chunk in chunks])
    low = torch.cat([problem.dense(*chunk, dtype) for chunk in chunks])
    ulp = torch.finfo(dtype).eps * exact.abs().max() / 2
    assert (out - exact).square().mean().sqrt() <= 2 * (low - exact).square().mean().sqrt() + ulp


@pytest.mark.parametrize(
    ("shape", "dtype", "page"),
    [
        ((32, 8, 128), torch.bfloat16, 64),
        ((8, 2, 128), torch.bfloat16, 16),
        ((8, 2, 128), torch.float16, 16),
        ((4, 4, 64), torch.bfloat16, 16),
        ((6, 2, 256), torch.bfloat16, 16),
    ],
    ids=str,
)
def test_a_mixed_batch_is_right(shape: tuple[int, int, int], dtype: torch.dtype, page: int) -> None:
    problem = Problem.draw([context for _, context in MIXED], *shape, dtype)
    chunks = list(enumerate(MIXED))
    check(problem, chunks, problem.run(compute, chunks, block_size=page))


@pytest.mark.parametrize("count", [1, 3, 200])
def test_contexts_read_in_parts_and_whole_are_right(count: int) -> None:
    lengths = [3000, 257, 1, 800]
    problem = Problem.draw(lengths, 32, 8, 128, torch.bfloat16)
    chunks = [(i % 4, (1, max(1, lengths[i % 4] - i // 4))) for i in range(count)]
    assert num_leading_singles(chunks) == count
    check(problem, chunks, problem.run(compute, chunks, block_size=64))


def test_a_graph_with_padded_sequences_replays_for_other_contexts() -> None:
    chunks = list(enumerate([(1, 300), (1, 5), (1, 64)]))
    problem = Problem.draw([300, 5, 64], 32, 8, 128, torch.bfloat16)
    args = {
        name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in problem.args(chunks, block_size=64).items()
    }
    pad = 5  # sequences of no context, as a first step leaves them
    for name in ("q_TNH", "block_table_SB", "context_lens_S"):
        args[name] = torch.cat(
            [args[name][:3], torch.zeros_like(args[name][:1]).repeat(pad, *[1] * (args[name].dim() - 1))]
        )
    out, run = bound(args, num_decodes=3 + pad)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    out.fill_(77.0)
    graph.replay()
    check(problem, chunks, [out[i : i + 1].cpu() for i in range(3)])
    args["context_lens_S"][0] = 200
    graph.replay()
    shorter = Problem([problem.q[0][[*range(199), 299]]], [problem.k[0][:200]], [problem.v[0][:200]])
    check(shorter, [(0, (1, 200))], [out[:1].cpu()])
