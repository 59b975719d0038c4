"""`certificate.json`: how far an engine's answers are from those of the checkpoint in fp32."""

from pathlib import Path

import msgspec

from tritium.errors import EngineError

CERTIFICATE_NAME = "certificate.json"


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """Logits of the engine against an fp32 reference that was streamed from the checkpoint, over `num_tokens` tokens.

    effort: "none", "quick" or "full". skipped: why nothing was measured. text: what the tokens were.
    mean_kl, max_kl: Kullback-Leibler divergence of the engine's next-token distribution from the reference's, in nats.
    top1_agreement: share of positions at which both find the same token likeliest.
    perplexity_engine, perplexity_reference: of the text that follows; None for random tokens.
    is_by_reference: the engine is for a GPU, there was none, and its ops' references took the kernels' places.
    bound: what mean_kl may be. is_overridden: the bound is the user's, in place of the scheme's own.
    """

    effort: str
    skipped: str = ""
    text: str = ""
    num_tokens: int = 0
    mean_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    perplexity_engine: float | None = None
    perplexity_reference: float | None = None
    bound: float | None = None
    is_overridden: bool = False
    is_by_reference: bool = False
    seconds: float = 0.0

    def encode(self) -> str:
        """As people read it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"

    def describe(self) -> str:
        """One line."""
        if self.skipped or self.mean_kl is None:
            return f"not measured: {self.skipped or 'effort ' + self.effort}"
        whose = " (overridden)" if self.is_overridden else ""
        how = ", by the ops' references: no GPU" if self.is_by_reference else ""
        return (
            f"mean KL {self.mean_kl:.2g} nats of at most {self.bound:.2g}{whose}, max {self.max_kl:.2g}, "
            f"top-1 agreement {self.top1_agreement:.2%}, {self.num_tokens} tokens of {self.text}{how}"
        )


def read_certificate(directory: Path) -> Certificate | None:
    """The engine's certificate; None when it has none. `EngineError` when it is damaged."""
    path = directory / CERTIFICATE_NAME
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Certificate)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is damaged ({error}): build the engine again") from None
