"""What the Router concludes from the reports of replicas."""

from __future__ import annotations

from mell_ray.engine.types import SequenceInfo
from mell_ray.scheduler.events import Adopt, Finish, Grow
from mell_ray.serving.books import CLAIM_TTL_S, SUBMIT_TTL_S, Entry, RequestBook


def book_with(replica_id: str | None = "a", *, now: float = 0.0) -> RequestBook:
    book = RequestBook(block_size=16)
    entry = Entry("r", "m", max_blocks=10, priority=0, arrival_s=0.0, ingress_id="i", generation=1)
    book.add(entry)
    if replica_id is not None:
        book.move(entry, replica_id, now, held=False)
    return book


def seen(tokens: int = 20, generation: int = 1, status="running") -> list[SequenceInfo]:
    return [SequenceInfo("r", generation, status, tokens, tokens - 1, 2, 0, 0)]


def test_growth_is_told_in_blocks() -> None:
    assert book_with().reconcile("a", "m", seen(33), 1.0) == [Grow({"r": 3})]


def test_request_that_vanishes_has_finished() -> None:
    book = book_with()
    book.reconcile("a", "m", seen(), 1.0)
    assert book.reconcile("a", "m", [], 1.1) == [Finish("r")]
    assert len(book) == 0


def test_request_not_submitted_yet_is_kept_for_a_while() -> None:
    book = book_with(now=0.0)
    assert book.reconcile("a", "m", [], SUBMIT_TTL_S - 1) == []
    assert book.reconcile("a", "m", [], SUBMIT_TTL_S + 1) == [Finish("r")]


def test_request_that_no_report_has_shown_ends_when_its_replica_says_so() -> None:
    """It came and went between two reports."""
    book = book_with(now=0.0)
    assert book.reconcile("a", "m", [], 0.1, [("other", 1), ("r", 1)]) == [Finish("r")]
    assert len(book) == 0


def test_what_ended_of_an_earlier_owner_is_not_the_request() -> None:
    """It was given up here, and has come back with a higher generation."""
    book = book_with(now=0.0)
    entry = book.get("r")
    assert entry is not None
    entry.generation = 2
    assert book.reconcile("a", "m", [], 0.1, [("r", 1)]) == []
    assert book.reconcile("b", "m", [], 0.1, [("r", 2)]) == []
    assert len(book) == 1


def test_unknown_request_is_adopted() -> None:
    book = RequestBook(block_size=16)
    assert book.reconcile("a", "m", seen(20), 1.0) == [Adopt("r", "m", "a", 2, 2, 0)]


def test_request_in_migration_is_not_taken_for_finished() -> None:
    book = book_with()
    book.reconcile("a", "m", seen(), 1.0)
    entry = book.get("r")
    assert entry is not None
    entry.migrating_to = "b"
    assert book.reconcile("a", "m", [], 1.1) == []
    assert book.reconcile("b", "m", seen(generation=2), 1.2) == []


def test_report_older_than_a_commit_changes_nothing() -> None:
    """The Migrator's answer may overtake a report that the target sent before the commit."""
    book = book_with()
    book.reconcile("a", "m", seen(), 1.0)
    entry = book.get("r")
    assert entry is not None
    entry.generation = 2
    book.move(entry, "b", 1.1, held=True)
    assert book.reconcile("b", "m", [], 1.2) == []
    assert book.reconcile("a", "m", seen(status="frozen"), 1.2) == []
    assert entry.replica_id == "b"


def test_migration_whose_result_was_lost_is_found_by_its_generation() -> None:
    book = book_with()
    book.reconcile("a", "m", seen(), 1.0)
    events = book.reconcile("b", "m", seen(generation=2), 1.1)
    assert events == [Finish("r"), Adopt("r", "m", "b", 2, 10, 0)]
    entry = book.get("r")
    assert entry is not None
    assert (entry.replica_id, entry.generation) == ("b", 2)


def test_reservation_is_no_request() -> None:
    assert RequestBook(16).reconcile("a", "m", seen(status="reserved"), 1.0) == []


def test_requests_of_a_dead_replica_wait_to_be_claimed() -> None:
    book = book_with()
    assert [entry.request_id for entry in book.lose_replica("a", 5.0)] == ["r"]
    assert book.unclaimed(5.0 + CLAIM_TTL_S - 1) == []
    assert book.unclaimed(5.0 + CLAIM_TTL_S + 1) == [Finish("r")]
