"""all_reduce, all_gather, embedding_part: what ranks that share a model compute together. References.

The references are for one process, which is then its only rank; kernels ask the communicator of their launch context.
"""

import torch

from tritium.ops.op import Op, like_first


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's x, in fp32 in the order of the ranks, cast once. Like x."""
    return x.clone()


def all_gather(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Every rank's x [..., N] side by side: [..., num_ranks * N].

    Raises `ValueError` for more than one rank: a single process has nobody to ask.
    """
    if num_ranks != 1:
        raise ValueError(f"all_gather of {num_ranks} ranks needs a communicator: run the engine of each rank")
    return x.clone()


def embedding_part(ids_T: torch.Tensor, weight_VD: torch.Tensor, first: int) -> torch.Tensor:
    """Row ids - first of a table that holds the rows from `first` on; zeros for ids that it lacks: [T, D]."""
    local_T = ids_T - first
    is_here_T = (local_T >= 0) & (local_T < weight_VD.shape[0])
    rows_TD = weight_VD[local_T.clamp(0, weight_VD.shape[0] - 1)]
    return torch.where(is_here_T[:, None], rows_TD, torch.zeros((), dtype=weight_VD.dtype, device=weight_VD.device))


def _gathered(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], num_ranks * x.shape[-1]), dtype=x.dtype, device=x.device)


def _rows(ids_T: torch.Tensor, weight_VD: torch.Tensor, first: int) -> torch.Tensor:
    return torch.empty((*ids_T.shape, weight_VD.shape[1]), dtype=weight_VD.dtype, device=ids_T.device)


ALL_REDUCE = Op(name="all_reduce", schema="all_reduce(Tensor x) -> Tensor", reference=all_reduce, fake=like_first)
ALL_GATHER = Op(
    name="all_gather", schema="all_gather(Tensor x, int num_ranks) -> Tensor", reference=all_gather, fake=_gathered
)
EMBEDDING_PART = Op(
    name="embedding_part",
    schema="embedding_part(Tensor ids_T, Tensor weight_VD, int first) -> Tensor",
    reference=embedding_part,
    fake=_rows,
)
