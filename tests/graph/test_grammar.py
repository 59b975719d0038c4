"""The grammar: what a graph may consist of at exit, and who is named when it does not."""

import pytest
import torch
from torch import fx

from tritium import ops
from tritium.errors import CaptureError
from tritium.graph.edit import insert
from tritium.graph.grammar import verify, verify_captured
from tritium.graph.spec import NUM_TOKENS, Spec, spec_of
from tritium.graph.vocabulary import FINAL
from tritium.kernels.eager.aten import ALLOWED
from tritium.passes.insert_kv import insert_kv
from tritium.passes.lower import op_name
from tritium.testing.graphs import graph_of


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (8, 12))


def last_call(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "call_function"][-1]


def test_every_op_of_a_finished_graph_has_an_eager_kernel():
    assert {op_name(target) for target in FINAL} <= set(ALLOWED)


def test_a_finished_graph_passes():
    graph = graph_of(lambda a, w: ops.linear(ops.rms_norm(a, w, 1e-5), a.new_ones(1, 12) * w, None), [x(), x(12)])
    with pytest.raises(CaptureError, match="new_ones"):
        verify(graph)
    verify(graph_of(lambda a, w: ops.rms_norm(a.view(-1, 12), w, 1e-5) + 1.0, [x(), x(12)]))


def test_a_size_where_a_tensor_is_expected_is_refused_with_its_node():
    node = last_call(graph_of(lambda a: a.sign(), [x()]))
    node.meta |= {"spec": NUM_TOKENS, "source": "model.py:7"}
    with pytest.raises(CaptureError, match=r"sign = aten\.sign\.default gives T .* At model\.py:7\. Write the model"):
        spec_of(node)


REFUSED = {
    "an op without a kernel": (lambda a: a.sign(), r"sign = aten.sign.default\(.*\) is an op that no kernel runs"),
    "several results": (lambda a: a.kthvalue(1, -1)[0], r"kthvalue .* is an op that no kernel runs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_runs_is_refused(name):
    fn, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        verify(graph_of(fn, [x()]))


def test_stateless_attention_is_refused_at_exit():
    with pytest.raises(CaptureError, match=r"attention = .*is still stateless: insert_kv must replace it"):
        verify(graph_of(lambda a: ops.attention(*[a.view(-1, 3, 4)] * 3, 0.5), [x()]))


def test_a_cache_that_is_read_before_it_is_written_is_refused():
    graph = graph_of(lambda a: ops.attention(*[a.view(-1, 3, 4)] * 3, 0.5), [x()])
    insert_kv(graph)
    verify(graph)
    (store,) = [n for n in graph.nodes if n.target is torch.ops.tritium.kv_store.default]
    graph.erase_node(store)
    with pytest.raises(CaptureError, match=r"paged_attention = .* reads kv.0 before anything is stored in it"):
        verify(graph)


BROKEN = {
    "wrong rank": (lambda a, w: ops.rms_norm(a, w, 1e-5), (1, 12), "rms_norm = .* needs weight of rank 1"),
    "wrong size": (lambda a, w: ops.rms_norm(a, w, 1e-5), (7,), "needs x and weight of equal last size"),
    "wrong linear": (lambda a, w: ops.linear(a, w[None], None), (1, 7), "needs x and weight_NK of equal last size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_arguments_that_a_kernel_cannot_take_are_refused(name):
    fn, shape, message = BROKEN[name]
    graph = graph_of(fn, [x(), x(12)])
    last_call(graph).args[1].meta["spec"] = Spec(torch.float32, shape)
    with pytest.raises(CaptureError, match=message):
        verify(graph)


def test_a_result_of_another_type_than_its_op_gives_is_refused():
    graph = graph_of(lambda a, w: ops.rms_norm(a, w, 1e-5), [x(), x(12)])
    last_call(graph).meta["spec"] = spec_of(last_call(graph)).with_shape((8, 12))
    with pytest.raises(CaptureError, match=r"must have a result like x, not float32\[8, 12\]"):
        verify(graph)


def test_a_node_without_provenance_is_refused_at_entry_and_exit():
    graph = graph_of(lambda a: a + 1.0, [x()])
    del last_call(graph).meta["covers"]
    for check in (verify_captured, verify):
        with pytest.raises(CaptureError, match=r"add .*has no spec or no provenance"):
            check(graph)


def test_names_of_inputs_are_unique():
    graph = graph_of(lambda a, b: a + b, [x(), x()])
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["name"] = "same"
    with pytest.raises(CaptureError, match=r"of its own name \('same'\)"):
        verify_captured(graph)


def test_literals_that_no_plan_can_hold_are_refused():
    graph = graph_of(lambda a: a + 1.0, [x()])
    call = last_call(graph)
    call.args = (call.args[0], 1j)
    with pytest.raises(CaptureError, match="has other=1j, which cannot be written into a plan"):
        verify(graph)


def test_inserted_calls_are_in_normal_form_and_know_where_they_come_from():
    graph = graph_of(lambda a: a.tanh() + 1.0, [x()])
    tanh, add = [node for node in graph.nodes if node.op == "call_function"]
    with graph.inserting_before(add):
        new = insert(graph, torch.ops.aten.add.Tensor, (tanh, 2.0), spec_of(add), like=add, covers=[tanh, add])
    assert new.kwargs == {"alpha": 1}
    assert new.meta["covers"] == ("tanh", "add") and new.meta["source"] == add.meta["source"]
