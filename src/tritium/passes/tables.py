"""Tables that a plan looks numbers up in must have a row for each number that can come: it is known at build."""

from collections.abc import Mapping

from tritium.engine.plan import Plan, Ref, Step, Value
from tritium.errors import ConfigError

TABLES = {"embedding": "weight_VD", "quantized_embedding": "qweight_VD"}  # a step's argument, by its op
SIGNS = {"aten.add.Tensor": 1, "aten.add.Scalar": 1, "aten.sub.Tensor": -1, "aten.sub.Scalar": -1}


def check_tables(plan: Plan, max_model_len: int) -> None:
    """Raises `ConfigError` for a table of positions or tokens that is too short, naming it. A kernel would read NaN.

    Positions may be shifted by a constant before they are looked up (a table whose first rows mean something else).
    """
    made_by = {name: step for step in plan.steps for name in step.outputs}
    for step in plan.steps:
        ids, table = step.args.get("ids_T"), step.args.get(TABLES.get(step.op, ""))
        if not isinstance(ids, Ref) or not isinstance(table, Ref):
            continue
        rows, (of, shift) = int(plan.value(table.value).shape[0]), _shifted(plan, made_by, ids.value)
        name = _root(plan.by_name, table.value)
        at = f" at position {shift:+}" if shift else ""
        if of == "positions" and shift < 0:
            raise ConfigError(
                f"the model looks positions up in {name!r}{at}, which is no row for the first {-shift} of them: shift "
                "them the other way, or not at all"
            )
        if of == "positions" and rows < max_model_len + shift:
            fits = f"give max_model_len={rows - shift} or less, or " if rows > shift else ""
            raise ConfigError(
                f"max_model_len is {max_model_len}, but {name!r}, which the model looks positions up in{at}, has "
                f"{rows} rows: {fits}give it a table with more rows"
            )
        if of == "input_ids" and not shift and rows < plan.vocab_size:
            raise ConfigError(
                f"the model's logits are for {plan.vocab_size} tokens, but {name!r}, which it looks tokens up in, has "
                f"{rows} rows: a token that is sampled must be one it can read; make both as large"
            )


def _shifted(plan: Plan, made_by: Mapping[str, Step], name: str) -> tuple[str, int]:
    """The value that `name` is, but for views and whole numbers added to it, and their sum."""
    shift = 0
    while True:
        name = _root(plan.by_name, name)
        step = made_by.get(name)
        if step is None or step.op not in SIGNS or not isinstance(step.args["self"], Ref):
            return name, shift
        other, alpha = step.args["other"], step.args.get("alpha", 1)
        if not isinstance(other, int) or not isinstance(alpha, int):
            return name, shift
        name, shift = step.args["self"].value, shift + SIGNS[step.op] * other * alpha


def _root(values: Mapping[str, Value], name: str) -> str:
    """The value that a chain of views looks at."""
    while values[name].kind == "view":
        name = values[name].base
    return name
