"""The garbage collector leaves alone what stays, for as long as it is told to."""

from __future__ import annotations

import gc
import weakref

import pytest

from rank_search.model.garbage import sparing_the_collector


class Node:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.self = self


def test_what_is_there_is_not_gone_through_again_until_the_block_ends() -> None:
    kept = Node()
    with sparing_the_collector() as settle:
        assert gc.get_freeze_count() == 0
        settle()
        assert gc.get_freeze_count() > 1000
        assert not any(thing is kept for thing in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(thing is kept for thing in gc.get_objects())


def test_garbage_is_freed_before_the_rest_is_kept() -> None:
    gone = weakref.ref(Node())
    with sparing_the_collector() as settle:
        settle()
        assert gone() is None
        later = weakref.ref(Node())
        gc.collect()
        assert later() is None


def test_it_is_over_after_an_error() -> None:
    def fail() -> None:
        with sparing_the_collector() as settle:
            settle()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_frozen_stays_so_and_nothing_is_added() -> None:
    gc.freeze()
    try:
        later = Node()
        with sparing_the_collector() as settle:
            settle()
            assert any(thing is later for thing in gc.get_objects())
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
