"""Which optional passes to leave out, where a test holds with all of them, with each one off, and without any."""

from tritium.passes.pipeline import OPTIONAL

ALL_ON = "all on"
LEFT_OUT: dict[str, tuple[str, ...]] = {
    ALL_ON: (),
    **{f"without {name}": (name,) for name in OPTIONAL},
    "all off": OPTIONAL,
}
