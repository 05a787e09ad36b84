"""What the router sees: 112 numbers of hashed text and 16 of the base's confidence in its own answer.

Everything here is fixed, not fitted: the same prompt gives the same numbers in every process, so that a
router trained yesterday reads today's prompts. Change anything and ``FEATURES`` must change with it.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.errors import CogumiError

Floats = NDArray[np.float64]

FEATURES = "hash4096-fold112-confidence16.1"
"""Written into every router. A router of other features is refused."""

TEXT_DIMENSIONS = 112
CONFIDENCE_DIMENSIONS = 16
DIMENSIONS = TEXT_DIMENSIONS + CONFIDENCE_DIMENSIONS
HASH_DIMENSIONS = 4096

HEAD, TAIL = 700, 300
"""Characters read of a long prompt: its beginning, and its end where the question often stands. Keeps 1 ms."""

FLOOR = -20.0
"""Log-probabilities are cut here (2e-9). An empty answer counts as one token at the floor."""

QUANTILES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of token log-probabilities separate right from wrong better than their mean (arXiv 2404.10136)."""

MIN_ROWS = 20
"""Fewer examples than this teach neither a calibration nor a router."""


def hash_text(text: str, dimensions: int, sizes: Sequence[int] = (3,)) -> Floats:
    """``hashed_text`` as a vector (dimensions,)."""
    columns, values = hashed_text(text, dimensions, sizes)
    vector = np.zeros(dimensions)
    vector[columns] = values
    return vector


def hashed_text(text: str, dimensions: int, sizes: Sequence[int] = (3,)) -> tuple[NDArray[np.int64], Floats]:
    """Signed hashing of word 1-2-grams and character n-grams of ``sizes``: (places, values), of length 1 together.

    Words and characters weigh the same. Lower case; the middle of a long text is skipped. The hashes
    are CRC-32 and a multiplicative one in NumPy: 0.1 ms, where scikit-learn's HashingVectorizer takes 1.5 ms.
    """
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]} {text[-TAIL:]}"
    words = ["^", *text.lower().split(), "$"]
    grams = [*words[1:-1], *map(" ".join, pairwise(words))]
    of_words = np.array([zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams], dtype=np.uint32)
    codes = np.frombuffer(" ".join(words).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    hashes = [of_words, *(_character_hashes(codes, size) for size in sizes)]
    parts = [_of_length_one(*_scattered(some, dimensions)) for some in hashes]
    return _of_length_one(np.concatenate([at for at, _ in parts]), np.concatenate([value for _, value in parts]))


def _character_hashes(codes: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    """A 32-bit hash of every run of ``size`` characters."""
    count = max(len(codes) - size + 1, 0)
    hashes = np.full(count, size, dtype=np.uint32)
    for offset in range(size):
        hashes = hashes * np.uint32(0x9E3779B1) + codes[offset : offset + count]
    return hashes


def _scattered(hashes: NDArray[np.uint32], dimensions: int) -> tuple[NDArray[np.int64], Floats]:
    """A place and +1 or -1 for each hash, after MurmurHash3's finalizer has mixed the bits."""
    mixed = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return (mixed % np.uint32(dimensions)).astype(np.int64), 1.0 - 2.0 * (mixed >> np.uint32(31)).astype(np.float64)


def _of_length_one(places: NDArray[np.int64], values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Values at the same place added, and all divided by their length."""
    columns, of = np.unique(places, return_inverse=True)
    total = np.bincount(of, weights=values, minlength=len(columns))
    return columns, total / (float(np.linalg.norm(total)) or 1.0)


@cache
def _fold() -> tuple[NDArray[np.int64], Floats]:
    """A sparse random projection 4096 -> 112: one +-1 a row. NumPy keeps RandomState's stream for ever."""
    draw = np.random.RandomState(128)
    return draw.randint(0, TEXT_DIMENSIONS, HASH_DIMENSIONS), draw.choice([-1.0, 1.0], HASH_DIMENSIONS)


def fold_text(hashed: Floats) -> Floats:
    """Project a hashed text (4096,) to (112,)."""
    columns, signs = _fold()
    return np.asarray(np.bincount(columns, weights=hashed * signs, minlength=TEXT_DIMENSIONS))


def confidence_features(logprobs: Sequence[float], completion_tokens: int) -> Floats:
    """16 numbers (16,) of an answer's natural-log token probabilities.

    8 quantiles, the first token, mean, deviation, square root of the negative sum, log of the length,
    shares of tokens below 1/2 and 1/10, and mean of -p log p (the known part of the entropy).

    Raises:
        CogumiError: a log-probability is NaN or above 0.
    """
    tokens = np.asarray(logprobs, dtype=np.float64) if len(logprobs) else np.array([FLOOR])
    if tokens.ndim != 1 or np.isnan(tokens).any() or tokens.max() > 1e-3:
        raise CogumiError(
            "token log-probabilities must be numbers of at most 0", "give the engine's natural-log probabilities"
        )
    tokens = np.clip(tokens, FLOOR, 0.0)
    ordered = np.sort(tokens)
    # np.quantile takes 100 microseconds; the same by interpolation takes 3.
    quantiles = np.interp(np.array(QUANTILES) * (len(tokens) - 1), np.arange(len(tokens)), ordered)
    probs = np.exp(tokens)
    rest = [
        tokens[0],
        tokens.mean(),
        tokens.std(),
        np.sqrt(-tokens.sum()),
        np.log1p(max(completion_tokens, 0)),
        (probs < 0.5).mean(),
        (probs < 0.1).mean(),
        -(probs * tokens).mean(),
    ]
    return np.concatenate([quantiles, rest])


def route_features(prompt: str, logprobs: Sequence[float], completion_tokens: int) -> Floats:
    """The router's input (128,): 112 of the prompt's text, then 16 of the base answer's confidence.

    Takes less than 1 ms. Raises CogumiError as ``confidence_features`` does.
    """
    text = fold_text(hash_text(prompt, HASH_DIMENSIONS))
    return np.concatenate([text, confidence_features(logprobs, completion_tokens)])


@dataclass(frozen=True)
class Examples:
    """Routing examples as arrays of n rows. ``passed`` says whether the base's answer was right."""

    task_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    domains: tuple[str, ...]
    families: tuple[str, ...]
    own_modifiers: tuple[str | None, ...]
    """The modifier responsible for the row's domain."""
    modifiers_passed: tuple[Mapping[str, bool], ...]
    passed: Floats
    test: NDArray[np.bool_]
    hashed: Floats
    """(n, 4096), see ``hash_text``."""
    confidence: Floats
    """(n, 16), see ``confidence_features``."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def features(self) -> Floats:
        """(n, 128), see ``route_features``."""
        return np.hstack([np.array([fold_text(row) for row in self.hashed]), self.confidence])

    def passed_by(self, row: int, modifier: str | None) -> float | None:
        """Whether ``modifier`` is right on a row (the base, for None); None when it was not run there."""
        if modifier is None:
            return float(self.passed[row])
        found = self.modifiers_passed[row].get(modifier)
        return None if found is None else float(found)

    def own_passed(self, row: int) -> float:
        """Whether the domain's own modifier is right on a row. One that was not run there counts as the base."""
        found = self.passed_by(row, self.own_modifiers[row])
        return float(self.passed[row]) if found is None else found


def read_examples(rows: Sequence[Mapping[str, Any]]) -> Examples:
    """Read rows of ``routing_examples``.

    Raises:
        CogumiError: fewer than 20 rows, a row that lacks a field, or an engine that gave no log-probabilities.
    """
    if len(rows) < MIN_ROWS:
        raise CogumiError(f"{len(rows)} routing examples, {MIN_ROWS} are needed", "raise routing.examples")
    try:
        blind = sum(1 for row in rows if not row["base"]["logprobs"])
        if blind > len(rows) / 2:
            raise CogumiError(
                f"{blind} of {len(rows)} routing examples have no token log-probabilities",
                "use an engine that returns them",
            )
        return Examples(
            task_ids=tuple(str(row["task_id"]) for row in rows),
            prompts=tuple(str(row["prompt"]) for row in rows),
            domains=tuple(str(row["domain"]) for row in rows),
            families=tuple(str(row.get("family", row["domain"])) for row in rows),
            own_modifiers=tuple(row["modifier"] for row in rows),
            modifiers_passed=tuple(
                {name: bool(run["passed"]) for name, run in row["modifiers"].items()} for row in rows
            ),
            passed=np.array([float(bool(row["base"]["passed"])) for row in rows]),
            test=np.array([row["split"] == "test" for row in rows]),
            hashed=np.array([hash_text(str(row["prompt"]), HASH_DIMENSIONS) for row in rows]),
            confidence=np.array(
                [confidence_features(row["base"]["logprobs"], int(row["base"]["completion_tokens"])) for row in rows]
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CogumiError(f"a routing example lacks a field: {error!r}", "materialize routing_examples again") from None
