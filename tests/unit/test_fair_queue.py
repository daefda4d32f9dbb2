from __future__ import annotations

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import AdapterPolicy, FairQueue, Policies
from unit.scheduler_support import make_sequence


def push(queue: FairQueue, sequence_id: int, adapter_id: str | None, **values: object) -> Sequence:
    sequence = make_sequence(sequence_id, adapter_id, **values)  # type: ignore[arg-type]
    queue.push(sequence)
    return sequence


def admit(queue: FairQueue, service: float = 0.0) -> int:
    """Admit the next sequence, charge its adapter, and say which it was."""
    lane = queue.peek()
    assert lane is not None
    sequence = lane.head
    queue.admit(lane)
    queue.charge(lane.client.adapter_id, service)
    return sequence.sequence_id


def test_the_least_served_adapter_goes_first() -> None:
    queue = FairQueue()
    for sequence_id, adapter_id in enumerate(["a", "a", "a", "b", "b", None]):
        push(queue, sequence_id, adapter_id)
    services = [10.0, 3.0, 3.0, 4.0, 3.0, 1.0]
    assert [admit(queue, service) for service in services] == [0, 3, 5, 4, 1, 2]
    assert queue.peek() is None
    assert len(queue) == 0


def test_service_is_divided_by_the_weight() -> None:
    queue = FairQueue(Policies([AdapterPolicy("heavy", weight=4.0)]))
    for sequence_id in range(10):
        push(queue, sequence_id, "heavy" if sequence_id < 8 else "light")
    order = [admit(queue, 12.0) for _ in range(10)]
    assert order == [0, 8, 1, 2, 3, 4, 9, 5, 6, 7]
    assert queue.counter("heavy") == 24.0
    assert queue.counter("light") == 24.0


def test_an_adapter_runs_no_more_sequences_than_it_may() -> None:
    queue = FairQueue(Policies([AdapterPolicy("a", max_running=2)]))
    sequences = [push(queue, sequence_id, "a") for sequence_id in range(4)]
    push(queue, 4, "b")
    assert [admit(queue, 1.0) for _ in range(3)] == [0, 4, 1]
    assert queue.peek() is None, "two of a run, two wait"
    queue.remove(sequences[0])
    assert admit(queue, 1.0) == 2
    queue.check_integrity()


def test_an_adapter_that_is_held_neither_goes_nor_saves_up() -> None:
    queue = FairQueue()
    for sequence_id in range(6):
        push(queue, sequence_id, "ab"[sequence_id % 2])
    lane = queue.peek()
    assert lane is not None
    queue.hold(lane.client)
    assert [admit(queue, 10.0), admit(queue, 10.0)] == [1, 3]
    queue.release("a")
    assert queue.counter("a") == 20.0
    queue.release("never seen")
    assert admit(queue) == 5, "both have the same, and b waited longer"
    queue.check_integrity()


def test_an_adapter_stays_held_while_it_is_away() -> None:
    queue = FairQueue()
    sequence = push(queue, 0, "a")
    lane = queue.peek()
    assert lane is not None
    queue.admit(lane)
    queue.hold(lane.client)
    queue.remove(sequence)
    assert queue.num_clients == 0
    push(queue, 1, "a")
    assert queue.peek() is None
    queue.release("a")
    assert admit(queue) == 1


def test_the_base_model_is_a_client_of_its_own() -> None:
    queue = FairQueue()
    push(queue, 0, None)
    push(queue, 1, "a")
    push(queue, 2, None)
    assert [admit(queue, 5.0), admit(queue, 7.0), admit(queue, 1.0)] == [0, 1, 2]
    assert queue.counter(None) == 6.0


def test_revisions_of_an_adapter_share_one_counter() -> None:
    queue = FairQueue()
    push(queue, 0, "a", revision="r1")
    push(queue, 1, "b")
    push(queue, 2, "a", revision="r2")
    assert [admit(queue, 5.0), admit(queue, 9.0), admit(queue, 1.0)] == [0, 1, 2]
    assert queue.counter("a") == 6.0


def test_within_an_adapter_priority_then_arrival() -> None:
    queue = FairQueue()
    for sequence_id, priority in enumerate([0, 5, 0, -1, 5]):
        push(queue, sequence_id, "a", priority=priority, revision=f"r{sequence_id % 2}")
    assert [admit(queue, 1.0) for _ in range(5)] == [1, 4, 0, 2, 3]


def test_priority_does_not_reach_over_to_other_adapters() -> None:
    queue = FairQueue()
    push(queue, 0, "a")
    push(queue, 1, "b", priority=100)
    assert admit(queue) == 0


def test_a_preempted_sequence_goes_before_those_of_its_priority() -> None:
    queue = FairQueue()
    first = push(queue, 0, "a")
    for sequence_id in range(1, 4):
        push(queue, sequence_id, "a", priority=1 if sequence_id == 3 else 0)
    assert admit(queue) == 3
    assert admit(queue) == 0
    assert admit(queue) == 1
    first.num_preemptions = 1
    queue.requeue(first)
    push(queue, 4, "a", priority=1)
    assert [admit(queue) for _ in range(3)] == [4, 0, 2]
    queue.check_integrity()


def test_a_newcomer_is_lifted_to_the_least_of_the_active() -> None:
    queue = FairQueue()
    for sequence_id in range(6):
        push(queue, sequence_id, "ab"[sequence_id % 2])
    admit(queue, 100.0)
    admit(queue, 70.0)
    push(queue, 6, "new")
    assert queue.counter("new") == 70.0
    assert queue.counter("a") == 100.0


def test_with_nobody_active_a_newcomer_is_lifted_to_the_last_that_left() -> None:
    queue = FairQueue()
    push(queue, 0, "a")
    admit(queue, 100.0)
    queue.charge("a", 20.0)  # it is decoding, not waiting
    push(queue, 1, "new")
    assert queue.counter("new") == 120.0


def test_coming_back_does_not_lower_a_counter() -> None:
    queue = FairQueue()
    sequence = push(queue, 0, "a")
    push(queue, 1, "b")
    push(queue, 2, "b")
    admit(queue, 100.0)
    queue.remove(sequence)
    push(queue, 3, "a")
    assert queue.counter("a") == 100.0
    assert admit(queue, 1.0) == 1


def test_parked_sequences_wait_without_being_active() -> None:
    queue = FairQueue()
    queue.park(("slow", "r1"))
    slow = push(queue, 0, "slow")
    push(queue, 1, "a")
    push(queue, 2, "a")
    assert len(queue) == 3
    assert queue.is_parked(("slow", "r1"))
    assert admit(queue, 50.0) == 1
    assert queue.unpark(("slow", "r1")) == [slow]
    assert queue.counter("slow") == 50.0, "it must not have saved up while it was loading"
    queue.check_integrity()


def test_a_parked_revision_does_not_hold_up_another() -> None:
    queue = FairQueue()
    queue.park(("a", "r2"))
    push(queue, 0, "a", revision="r2", priority=9)
    push(queue, 1, "a", revision="r1")
    assert admit(queue) == 1
    assert queue.peek() is None
    assert queue.waiting(("a", "r2")) != []


def test_unparking_what_does_not_wait_does_nothing() -> None:
    queue = FairQueue()
    assert queue.unpark(("a", "r1")) == []
    assert queue.waiting(("a", "r1")) == []
    assert not queue.is_parked(("a", "r1"))


def test_set_aside_hides_a_client_until_restore() -> None:
    queue = FairQueue()
    for sequence_id in range(3):
        push(queue, sequence_id, "abc"[sequence_id])
    queue.set_aside()
    assert admit(queue) == 1
    queue.set_aside()
    assert queue.peek() is None
    queue.restore()
    assert [admit(queue), admit(queue)] == [0, 2]
    queue.check_integrity()


def test_the_ready_lane_is_the_one_whose_head_is_next() -> None:
    queue = FairQueue()
    push(queue, 0, "a", revision="r1")
    push(queue, 1, "a", revision="r2", priority=1)
    keys = [("a", "r1"), ("a", "r2"), None]
    (lane,) = queue.ready_lanes(keys)
    assert (lane.key, lane.head.sequence_id) == (("a", "r2"), 1)
    queue.park(("a", "r2"))
    (lane,) = queue.ready_lanes(keys)
    assert lane.key == ("a", "r1")
    assert queue.ready_lanes([None]) == []


def test_clients_that_came_once_are_forgotten() -> None:
    queue = FairQueue()
    for sequence_id in range(5000):
        sequence = push(queue, sequence_id, f"once-{sequence_id}")
        admit(queue, 10.0)
        queue.remove(sequence)
    assert queue.num_clients <= 2
    assert queue.counter("any") == 50_000.0
    queue.check_integrity()


def test_leaving_and_coming_back_is_not_a_way_to_be_served_more() -> None:
    queue = FairQueue()
    for sequence_id in range(4):
        push(queue, sequence_id, "patient")

    def visit(sequence_id: int, adapter_id: str, service: float) -> None:
        """Come, be served first, leave."""
        sequence = push(queue, sequence_id, adapter_id, priority=1)
        (lane,) = queue.ready_lanes([(adapter_id, "r1")])
        assert lane.head is sequence
        queue.admit(lane)
        queue.charge(adapter_id, service)
        queue.remove(sequence)

    visit(10, "greedy", 5.0)
    visit(11, "greedy", 100.0)
    admit(queue, 50.0)
    assert queue.floor == 50.0
    visit(12, "other", 1.0)  # somebody leaves: whoever is at the floor is forgotten
    assert queue.counter("greedy") == 105.0
    admit(queue, 70.0)
    visit(13, "other", 1.0)
    assert queue.counter("greedy") == queue.floor == 120.0
    assert queue.num_clients == 2
    queue.check_integrity()


def test_a_preempted_sequence_goes_before_an_older_one_that_never_ran() -> None:
    queue = FairQueue()
    queue.park(("a", "r2"))
    older, younger = push(queue, 0, "a", revision="r2"), push(queue, 1, "a", revision="r1")
    assert admit(queue) == 1
    queue.unpark(("a", "r2"))
    younger.num_preemptions = 1
    queue.requeue(younger)
    assert queue.order(younger) < queue.order(older)
    assert [admit(queue), admit(queue)] == [1, 0]


def test_who_is_admitted_was_overtaken_enough() -> None:
    queue = FairQueue()
    push(queue, 0, "a")
    push(queue, 1, "a")
    lane = queue.peek()
    assert lane is not None
    lane.client.overtaken = 7.0
    admit(queue)
    assert lane.client.overtaken == 0.0
