"""Tables that a plan looks numbers up in must have a row for each number that can come: it is known at build."""

from collections.abc import Mapping

from tritium.engine.plan import Plan, Ref, Value
from tritium.errors import ConfigError


def check_tables(plan: Plan, max_model_len: int) -> None:
    """Raises `ConfigError` for a table of positions or tokens that is too short, naming it. A kernel would read NaN."""
    for step in plan.steps:
        ids, table = step.args.get("ids_T"), step.args.get("weight_VD")
        if step.op != "embedding" or not isinstance(ids, Ref) or not isinstance(table, Ref):
            continue
        rows, of = plan.value(table.value).shape[0], _root(plan.by_name, ids.value)
        name = _root(plan.by_name, table.value)
        if of == "positions" and int(rows) < max_model_len:
            raise ConfigError(
                f"max_model_len is {max_model_len}, but {name!r}, which the model looks positions up in, has {rows} "
                f"rows: give max_model_len={rows} or less, or a table with more rows"
            )
        if of == "input_ids" and int(rows) < plan.vocab_size:
            raise ConfigError(
                f"the model's logits are for {plan.vocab_size} tokens, but {name!r}, which it looks tokens up in, has "
                f"{rows} rows: a token that is sampled must be one it can read; make both as large"
            )


def _root(values: Mapping[str, Value], name: str) -> str:
    """The value that a chain of views looks at."""
    while values[name].kind == "view":
        name = values[name].base
    return name
