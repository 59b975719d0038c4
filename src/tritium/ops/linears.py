"""embedding, linear, gather_rows: references and spellings."""

import torch
import torch.nn.functional as F

from tritium.ops.op import Op, Spelling


def embedding(ids_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Rows of the table: [T, D]."""
    return F.embedding(ids_T, weight_VD)


def linear(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight_NK.T + bias`, summed as torch does for the dtype: [..., K] -> [..., N]."""
    return F.linear(x, weight_NK, bias)


def gather_rows(x_TD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    """Row `rows_R[r]` of x for each r: [R, D]. `rows_R` is int64; the compiler places this before lm_head."""
    return x_TD.index_select(0, rows_R)


def _embedding_shape(ids_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    return torch.empty((*ids_T.shape, weight_VD.shape[1]), dtype=weight_VD.dtype, device=ids_T.device)


def _linear_shape(x: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], weight_NK.shape[0]), dtype=x.dtype, device=x.device)


def _gather_rows_shape(x_TD: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    return torch.empty((rows_R.shape[0], x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)


def _ids_weight(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.arange(8) * 3, torch.randn(40, 48, dtype=dtype)


def _x_weight(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return torch.randn(8, 48, dtype=dtype), torch.randn(24, 48, dtype=dtype)


def _x_weight_bias(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return *_x_weight(dtype), torch.randn(24, dtype=dtype)


def _indexed(ids_T: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    return weight_VD[ids_T]


def _no_bias(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight_NK)


def _matmul(x: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    return x @ weight_NK.t()


EMBEDDING = Op(
    name="embedding",
    schema="embedding(Tensor ids_T, Tensor weight_VD) -> Tensor",
    reference=embedding,
    fake=_embedding_shape,
    spellings=(
        Spelling(name="functional", fn=embedding, example=_ids_weight),
        Spelling(name="indexed", fn=_indexed, example=_ids_weight),
    ),
)
LINEAR = Op(
    name="linear",
    schema="linear(Tensor x, Tensor weight_NK, Tensor? bias) -> Tensor",
    reference=linear,
    fake=_linear_shape,
    spellings=(
        Spelling(name="functional", fn=linear, example=_x_weight_bias),
        Spelling(name="no_bias", fn=_no_bias, example=_x_weight, binds={"bias": None}),
        Spelling(name="matmul", fn=_matmul, example=_x_weight, binds={"bias": None}),
    ),
)
GATHER_ROWS = Op(
    name="gather_rows",
    schema="gather_rows(Tensor x_TD, Tensor rows_R) -> Tensor",
    reference=gather_rows,
    fake=_gather_rows_shape,
)
