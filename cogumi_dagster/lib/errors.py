"""The one error that a user is meant to read: what is wrong, and how to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class CogumiError(Exception):
    """Something the user can mend. ``retryable`` says whether trying again may help by itself."""

    def __init__(self, problem: str, mend: str = "", *, retryable: bool = False) -> None:
        self.problem = problem.strip()
        self.mend = mend.strip()
        self.retryable = retryable
        super().__init__(f"{self.problem}\n  mend: {self.mend}" if self.mend else self.problem)


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause for error messages: the nearest known word, else the list of all of them."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


NO_MEMORY = ("can't allocate memory", "out of memory", "could not create a primitive")
"""What torch, llama.cpp and oneDNN say when an allocation failed, in RuntimeErrors."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    )
