"""Every pass of the pipelines: it matches, refuses a near miss, keeps what others read, and matches in a chain; and in
each of these graphs a second run, provenance and results are as `testing/pass_cases.py` says."""

import inspect
import re

import pytest
import torch

from tritium.passes import encoder_pipeline, module_pipeline, pipeline
from tritium.passes.result import PassResult
from tritium.testing.normalising_cases import NORMALISING
from tritium.testing.optimising_cases import OPTIMISING
from tritium.testing.pass_cases import KINDS, Case, check
from tritium.testing.quantising_cases import QUANTISING

ROWS = NORMALISING | OPTIMISING | QUANTISING
CASES = [(name, kind) for name, row in ROWS.items() for kind in KINDS if isinstance(row.case(kind), Case)]
FUNCTIONS = {row.name: row.run.__name__ for row in (*pipeline.PASSES, *module_pipeline.MODULE)}  # run several times


@pytest.fixture(autouse=True)
def weights_tell_the_dtype(monkeypatch):
    """recognise asks the model's matrices for their type; most of these graphs have none."""
    monkeypatch.setattr("tritium.passes.recognise.dtypes", lambda graph: [torch.float32])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pass_does_what_its_docstring_says_and_nothing_else(name, kind):
    check(ROWS[name], ROWS[name].case(kind))


def test_every_pass_that_a_pipeline_names_has_its_row_and_no_row_is_of_none():
    code = "\n".join(inspect.getsource(module) for module in (pipeline, encoder_pipeline, module_pipeline))
    named = set(re.findall(r'Pass\(\s*name="(\w+)"|matches\["(\w+)"\]', code))
    passes = {FUNCTIONS.get(name, name) for pair in named for name in pair if name}
    assert len(passes) > 25 and passes == set(ROWS)


def test_every_pass_says_what_it_matches_and_what_it_puts_there():
    functions = [
        value
        for pipe in (pipeline, encoder_pipeline, module_pipeline)
        for value in vars(pipe).values()
        if inspect.isfunction(value) and value.__module__ != pipe.__name__
        if "PassResult" in str(inspect.signature(value).return_annotation)
    ]
    assert len(functions) > 25
    for function in functions:
        text = inspect.getmodule(function).__doc__
        assert "\nMatches: " in text and "\nReplaces with: " in text, function


def test_a_row_without_a_graph_says_why_and_each_near_miss_and_match_has_one():
    for row in ROWS.values():
        assert isinstance(row.match, Case) and row.match.matches > 0
        assert isinstance(row.near_miss, Case) and row.near_miss.matches == 0
        assert all(isinstance(found, Case) or len(found) > 20 for found in map(row.case, KINDS))


def test_the_check_finds_a_pass_that_loses_what_it_stands_for_and_one_that_matches_again():
    row = ROWS["fuse_add_norm"]

    def forgetful(graph):
        result = row.run(graph)
        for node in graph.nodes:
            node.meta["covers"] = ()
        return result

    with pytest.raises(AssertionError, match="nothing covers"):
        check(type(row)(**{**vars(row), "run": forgetful}), row.match)
    with pytest.raises(AssertionError, match="a second run matches again"):
        check(type(row)(**{**vars(row), "run": lambda graph: PassResult(row.run(graph).num_matches or 1)}), row.match)
