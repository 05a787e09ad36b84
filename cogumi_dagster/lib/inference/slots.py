"""Which request runs in which of llama.cpp's slots, and whether it may read what the slot has cached."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

CONTINUES = 0.5
"""A request goes to the slot of whose last prompt it begins with at least this share; others leave that cache alone."""


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@dataclass(frozen=True)
class _Held:
    """What a slot computed last: its cache holds this prompt and the answer to it, under this adapter."""

    adapter: str | None
    prompt: str


@dataclass(frozen=True)
class Place:
    slot: int
    reuse: bool
    """The slot's cache is of the same adapter: a common beginning need not be computed again."""


class Slots:
    """Hands out slots. A cache is read only by requests with the adapter that filled it (llama.cpp#26207: the server
    itself does not look)."""

    def __init__(self, count: int) -> None:
        self._free: OrderedDict[int, _Held | None] = OrderedDict((slot, None) for slot in range(count))
        self._changed = threading.Condition()

    @contextmanager
    def take(self, adapter: str | None, prompt: str) -> Iterator[Place]:
        """A free slot, waited for if need be. After an error nothing is known of its cache, and nothing reads it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            slot = self._best(adapter, prompt)
            held = self._free.pop(slot)
        after: _Held | None = None
        try:
            yield Place(slot, held is not None and held.adapter == adapter)
            after = _Held(adapter, prompt)
        finally:
            with self._changed:
                self._free[slot] = after
                self._changed.notify()

    def _best(self, adapter: str | None, prompt: str) -> int:
        """The slot whose last conversation goes on, else the one that has rested longest."""
        continued = {}
        for slot, held in self._free.items():
            if held is not None and held.adapter == adapter:
                common = _common(held.prompt, prompt)
                if common >= CONTINUES * len(held.prompt):
                    continued[slot] = common
        return max(continued, key=lambda slot: continued[slot], default=next(iter(self._free)))
