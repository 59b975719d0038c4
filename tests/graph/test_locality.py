"""The token-locality proof: what mixes tokens is refused by name, what does not is accepted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritium import ops
from tritium.errors import CaptureError
from tritium.graph.capture import capture
from tritium.graph.locality import prove_token_local
from tritium.passes.canonicalise import canonicalise
from tritium.passes.dead_code import remove_dead_code
from tritium.passes.recognise_attention import recognise_attention

V, D = 50, 12


class Model(nn.Module):
    """An embedding, `body`, a head."""

    def __init__(self, body) -> None:
        super().__init__()
        self.embed, self.head, self.body = nn.Embedding(V, D), nn.Linear(D, V), body
        self.table, self.gain = nn.Parameter(torch.ones(64, D)), nn.Parameter(torch.ones(D))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x_TD = self.embed(input_ids)
        return self.head(self.body(self, x_TD, positions))


def prove(body) -> None:
    with torch.device("meta"):
        model = Model(body)
    graph = capture(model).graph
    canonicalise(graph)
    recognise_attention(graph)
    remove_dead_code(graph)
    prove_token_local(graph)


def alibi(x, slopes):
    """Attention of three heads with these slopes."""
    heads = x.view(-1, 3, 4)
    return ops.attention(heads, heads, heads, 0.5, alibi_slopes_N=slopes).view(-1, D)


def experts(x, gate_up, down):
    """One of two experts for each token."""
    return ops.moe(x, x[:, :2], gate_up, down, 1, True, "silu")


REFUSED = {
    "mean over the tokens": (lambda m, x, p: x - x.mean(0), "mean", "works along the tokens"),
    "mean over everything": (lambda m, x, p: x - x.mean(), "mean", "works along the tokens"),
    "cumulative sum": (lambda m, x, p: x.cumsum(0), "cumsum", "works along the tokens"),
    "flip": (lambda m, x, p: x.flip(0), "flip", "works along the tokens"),
    "roll": (lambda m, x, p: x.roll(1, 0), "roll", "works along the tokens"),
    "softmax over the tokens": (lambda m, x, p: x.softmax(0), "softmax", "works along the tokens"),
    "shift": (lambda m, x, p: x + F.pad(x[1:], (0, 0, 0, 1)), "slice", "takes some of the tokens"),
    "the last token": (lambda m, x, p: x + x[-1], "select", "takes some of the tokens"),
    "the first token": (lambda m, x, p: x + x[:1], "slice", "takes some of the tokens"),
    "gather along the tokens": (lambda m, x, p: x[p], "index", "gathers values of other tokens"),
    "index_select along the tokens": (lambda m, x, p: x.index_select(0, p), "index_select", "values of another"),
    "arange into arithmetic": (
        lambda m, x, p: x * torch.arange(x.shape[0], device=x.device)[:, None],
        "arange",
        "reads the number of tokens",
    ),
    "arange as positions": (
        lambda m, x, p: x + F.embedding(torch.arange(x.shape[0], device=x.device), m.table),
        "arange",
        "must be computed from the argument `positions`",
    ),
    "the number of tokens in arithmetic": (lambda m, x, p: x * x.shape[0], "mul", "reads the number of tokens"),
    "the number of tokens as a divisor": (lambda m, x, p: x / x.shape[0] ** 0.5, "div", "reads the number of tokens"),
    "ones for every token": (lambda m, x, p: x + x.new_ones(x.shape[0], 1), "new_ones", "reads the number of tokens"),
    "products of tokens": (lambda m, x, p: (x @ x.t()) @ x, "matmul", "multiplies tokens with tokens"),
    "sums over tokens": (lambda m, x, p: x + (x.t() @ x).mean(), "matmul", "multiplies tokens with tokens"),
    "broadcast along the tokens": (
        lambda m, x, p: (x[:, None] * x[None]).sum(1),
        "mul",
        "every token with every other",
    ),
    "an outer difference": (lambda m, x, p: x + (p[:, None] - p[None]).float().sum(1, True), "sub", "every other"),
    "hand-written attention in a batch": (
        lambda m, x, p: ((x[None] @ x[None].transpose(1, 2)).float().softmax(-1) @ x[None])[0],
        "matmul",
        "Attention is to be written as",
    ),
    "hand-written attention with a mask": (
        lambda m, x, p: (
            (x[None] * 2 @ x[None].mT)
            .masked_fill(torch.ones(x.shape[0], x.shape[0], device=x.device).tril()[None] == 0, -1e9)
            .softmax(-1)
            @ x[None]
        )[0],
        "matmul",
        "Attention is to be written as",
    ),
    "a batch of differences": (
        lambda m, x, p: x + (p[None, :, None] - p[None, None]).float().view(1, x.shape[0], -1).sum(-1).t(),
        "sub",
        "T x T",
    ),
    "tokens folded into features": (lambda m, x, p: x.t().contiguous().view(-1, D), "view", "folds the tokens"),
    "appended tokens": (lambda m, x, p: torch.cat((x, x), 0), "cat", "appends to the tokens"),
    "attention to the future": (
        lambda m, x, p: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
        "scaled_dot_product_attention",
        "attention in a form that is not recognised",
    ),
    "weights made of tokens": (lambda m, x, p: F.layer_norm(x, (D,), x.mean(1, True).sum() * m.gain), "sum", "works"),
    "alibi slopes made of tokens": (lambda m, x, p: alibi(x, x[:, 0]), "attention", "alibi_slopes_N to be the same"),
    "experts made of tokens": (
        lambda m, x, p: ops.moe(
            x, x[:, :2], m.table[:8].view(2, 4, D) * x.sum(), m.table[:4].view(2, D, 2), 1, True, "silu"
        ),
        "sum",
        "works along the tokens",
    ),
    "an unknown op": (lambda m, x, p: torch.special.i0(x), "special_i0", "not known whether it works token by token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_is_refused_with_its_node_and_place(name):
    body, node, reason = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        prove(body)
    message = str(caught.value)
    assert f"token-local: {node}" in message and reason in message
    assert "test_locality.py:" in message, "the model's line is not named"


ACCEPTED = {
    "element-wise": lambda m, x, p: (x * 2 + m.gain).tanh() / (1 + x.abs()),
    "norms": lambda m, x, p: F.layer_norm(x, (D,), m.gain) + ops.rms_norm(x, m.gain, 1e-5),
    "softmax over features": lambda m, x, p: x.softmax(-1) + x.log_softmax(1).exp(),
    "heads": lambda m, x, p: x.view(-1, 3, 4).transpose(0, 1).mean(-1).t() @ m.table[:3],
    "norm of each head": lambda m, x, p: F.layer_norm(x.view(-1, 4), (4,)).view(-1, D),
    "a batch of one": lambda m, x, p: (x[None] @ m.table[:D])[0],
    "positions": lambda m, x, p: x + F.embedding(p, m.table) + p[:, None].to(x.dtype) * m.gain,
    "an indexed table": lambda m, x, p: x + m.table[p],
    "masks of features": lambda m, x, p: torch.where(x > 0, x, x * 0.1) + torch.zeros_like(x),
    "causal attention": lambda m, x, p: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0],
    "mixing before it is read by nobody": lambda m, x, p: (x.mean(0), x)[1],
    "in place": lambda m, x, p: x.clone().mul_(2.0).add_(m.gain),
    "features cut and joined": lambda m, x, p: torch.cat((x[:, 6:], x[:, :6]), -1),
    "stacked": lambda m, x, p: torch.stack((x, x * 2), 0).sum(0) + torch.stack((x, x), -1).mean(-1),
    "experts": lambda m, x, p: experts(x, m.table[:8].view(2, 4, D), m.table[:4].view(2, D, 2)),
    "alibi": lambda m, x, p: alibi(x, m.gain[:3]),
    "a weight by a weight": lambda m, x, p: x * (m.table @ m.gain).mean(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_works_token_by_token_is_accepted(name):
    prove(ACCEPTED[name])
