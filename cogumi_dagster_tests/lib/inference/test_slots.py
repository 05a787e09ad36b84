import threading
import time

import pytest

from cogumi_dagster.lib.inference.slots import Slots


def test_a_cache_is_read_only_under_the_adapter_that_filled_it() -> None:
    slots = Slots(1)
    seen = []
    for adapter in (None, None, "code", "code", None):
        with slots.take(adapter, "the same prompt") as place:
            seen.append(place.reuse)
    assert seen == [False, True, False, True, False]


def test_a_conversation_returns_to_its_slot_and_others_leave_it_alone() -> None:
    slots = Slots(3)
    with slots.take(None, "user: a long first turn") as first:
        pass
    with slots.take(None, "user: quite another thing") as other:
        pass
    assert other.slot != first.slot
    with slots.take(None, "user: a long first turn\nassistant: yes\nuser: a far longer second turn") as second:
        assert second == type(second)(first.slot, True)
    with slots.take("code", "user: a long first turn") as third:
        assert third.slot not in (first.slot, other.slot) and not third.reuse


def test_after_an_error_nothing_is_known_of_a_cache() -> None:
    slots = Slots(1)
    with slots.take(None, "p"):
        pass
    with pytest.raises(RuntimeError), slots.take(None, "p") as place:
        assert place.reuse
        raise RuntimeError
    with slots.take(None, "p") as place:
        assert not place.reuse


def test_a_request_waits_for_a_slot() -> None:
    slots = Slots(1)
    order = []

    def second() -> None:
        with slots.take(None, "p"):
            order.append("second")

    with slots.take(None, "p"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
