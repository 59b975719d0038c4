"""A batch in the making counts its budget both ways."""

from tritium.runtime.batch_draft import BatchDraft
from tritium.runtime.request import ScheduledSequence
from tritium.testing.scheduling import make_request


def test_a_dropped_sequence_leaves_the_batch_and_gives_its_budget_back():
    draft, (a, b) = BatchDraft(10), (make_request(name, [1, 2, 3]) for name in "ab")
    draft.add(ScheduledSequence(a, 0, 3, True))
    draft.add(ScheduledSequence(b, 0, 2, False))
    assert draft.budget == 5
    draft.drop(a)
    assert draft.budget == 8
    batch = draft.seal([])
    assert batch.sequences == (ScheduledSequence(b, 0, 2, False),) and batch.preempted == (a,)
    assert (batch.num_tokens, batch.num_sampled) == (2, 0)


def test_a_request_preempted_before_its_turn_costs_no_budget():
    draft, request = BatchDraft(10), make_request("a", [1])
    draft.drop(request)
    assert draft.budget == 10 and draft.seal([]).preempted == (request,)
