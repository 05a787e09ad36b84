"""Is the user unhappy with the previous answer? A teacher that embeds sentences, a student that hashes n-grams.

The teacher (a logistic regression on sentence embeddings and n-grams) is too large to sit in front of
every request. The student learns the teacher's probabilities on the messages and on noisy copies of them,
and is one float16 vector. What ships is what was measured: both are fitted on the training groups alone.

Measured on resources/sources/escalation.jsonl with all-MiniLM-L6-v2, seeds 0 to 5: accuracy of the teacher
0.885, of the student 0.845 (0.81 to 0.88) with a recall of 0.84 (0.78 to 0.88); the majority gets 0.52. Whole
phrases are held out, so these are figures for wordings never seen; the settings below were chosen on such splits.
605 messages in place of 1,431 gave 0.77.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation import statistics as stats
from cogumi_dagster.lib.routing.calibration import sigmoid
from cogumi_dagster.lib.routing.features import Floats, hashed_text

log = logging.getLogger(__name__)

Embed = Callable[[Sequence[str]], NDArray[np.floating[Any]]]
"""Sentence embeddings (n, width) of n texts."""

LABELS = ("dissatisfied", "neutral", "satisfied")
UNHAPPY = LABELS[0]

BUCKETS = 2**15
SIZES = (3,)
"""Character n-grams survive typing errors. Sizes 3 to 5 together were no better."""

HELD_OUT_PERCENT = 20
MIN_GROUPS = 10
COPIES = 3
"""Noisy copies of each training message."""

GOLD_SHARE = 0.5
"""Weight of the hand-given label against the teacher's probability in the student's target."""

TEACHER_C = 5.0
STUDENT_C = 3.0
"""scikit-learn's C. 30 cost the student 0.02 of held-out accuracy; the teacher hardly minds."""

OPENERS = ("hmm, ", "ok so ", "well, ", "um ", "hey, ", "so ", "hm ", "look, ")
"""Words before a message that say nothing of the user's mood."""


@dataclass(frozen=True)
class EscalationDetector:
    """A logistic model of hashed n-grams: weights (32768,) and a bias."""

    weights: NDArray[np.float32]
    bias: float

    def score(self, text: str) -> float:
        """P(the writer is dissatisfied with the answer before). 0.5 is the operating point."""
        columns, values = hashed_text(text, len(self.weights), SIZES)
        return float(sigmoid(self.weights[columns] @ values + self.bias))

    def save(self, path: Path) -> int:
        """Write float16 weights as .npz; return the bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        bias = np.array(self.bias, dtype=np.float32)
        np.savez_compressed(path, weights=self.weights.astype(np.float16), bias=bias, sizes=np.array(SIZES))
        return path.stat().st_size

    @classmethod
    def load(cls, path: Path) -> "EscalationDetector":
        """Read what ``save`` wrote.

        Raises:
            CogumiError: no such file, broken, or made for other features.
        """
        mend = "materialize escalation_detector again"
        try:
            with np.load(path, allow_pickle=False) as archive:
                weights, bias, sizes = archive["weights"], float(archive["bias"]), archive["sizes"]
        except FileNotFoundError:
            raise CogumiError(f"there is no escalation detector {path}", mend) from None
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            raise CogumiError(f"{path} is not an escalation detector: {error!r}", mend) from None
        weights = weights.astype(np.float32)
        if weights.shape != (BUCKETS,) or tuple(sizes) != SIZES or not np.isfinite([*weights, bias]).all():
            raise CogumiError(f"{path} holds a detector for other features", mend)
        return cls(weights, bias)


@dataclass(frozen=True)
class EscalationReport:
    """Figures of the saved detector on held-out groups of paraphrases; the intervals are over groups."""

    messages: Mapping[str, int]
    """Messages by label, in all."""
    train: int
    held_out: int
    held_out_groups: int
    accuracy: stats.Proportion
    """Dissatisfied or not."""
    recall_dissatisfied: stats.Proportion
    false_alarms: stats.Proportion
    """Share of the neutral and satisfied that raise an alarm."""
    majority: stats.Proportion
    balanced_accuracy: float
    auroc: stats.Estimate
    teacher_accuracy: stats.Proportion
    teacher_recall: stats.Proportion
    agreement: stats.Proportion
    """Student and teacher decide alike."""
    bytes: int
    milliseconds_median: float
    mistakes: tuple[str, ...]


def fit_escalation(
    rows: Sequence[Mapping[str, Any]], embed: Embed, out: Path, seed: int, max_bytes: int = 3_000_000
) -> EscalationReport:
    """Train teacher and student on messages ``{"text", "label", "group"}``, save the student, measure it.

    Raises:
        CogumiError: a bad row, too few groups, embeddings of the wrong shape, a file above ``max_bytes``.
    """
    texts, unhappy, groups = _read(rows)
    held = np.array([_is_held_out(group, seed) for group in groups])
    _check_groups(groups, unhappy, held)
    train, test = _where(texts, ~held), _where(texts, held)
    teacher = _fit_teacher(train, unhappy[~held], embed)
    noisy, sources = _with_copies(train, seed)
    targets = GOLD_SHARE * unhappy[~held][sources] + (1 - GOLD_SHARE) * teacher(noisy)
    student = _fit_student(noisy, targets)
    size = student.save(out)
    if size > max_bytes:
        out.unlink()
        raise CogumiError(f"the escalation detector is {size:,} bytes", f"the limit is {max_bytes:,}")
    report = _measure(
        EscalationDetector.load(out), teacher(test), test, unhappy[held], _where(groups, held), seed,
        messages={label: sum(row["label"] == label for row in rows) for label in LABELS},
        train=len(train), bytes=size,
    )  # fmt: skip
    log.info("escalation: accuracy %.3f, recall %.3f", report.accuracy.value, report.recall_dissatisfied.value)
    return report


def _read(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], NDArray[np.bool_], list[str]]:
    for number, row in enumerate(rows, 1):
        if not {"text", "label", "group"} <= row.keys() or row["label"] not in LABELS or not str(row["text"]).strip():
            raise CogumiError(
                f"message {number} is not one: {dict(row)!r}", f"give text, group and a label of {LABELS}"
            )
    unhappy = np.array([row["label"] == UNHAPPY for row in rows], dtype=bool)
    return [str(row["text"]) for row in rows], unhappy, [str(row["group"]) for row in rows]


def _is_held_out(group: str, seed: int) -> bool:
    """Whole groups are held out, so that no paraphrase of a measured message was trained on."""
    return int(hashlib.sha256(f"{seed} {group}".encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def _where(items: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [item for item, inside in zip(items, chosen, strict=True) if inside]


def _check_groups(groups: Sequence[str], unhappy: NDArray[np.bool_], held: NDArray[np.bool_]) -> None:
    for part, inside, least in (("training", ~held, MIN_GROUPS), ("held-out", held, 1)):
        for kind, chosen in (("dissatisfied", unhappy), ("other", ~unhappy)):
            found = len(set(_where(groups, inside & chosen)))
            if found < least:
                raise CogumiError(f"{found} {part} groups of {kind} messages, {least} are needed", "add messages")


def _embedded(embed: Embed, texts: Sequence[str]) -> Floats:
    found = np.asarray(embed(texts), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
        raise CogumiError(f"embeddings of shape {found.shape} for {len(texts)} texts", "give one finite vector each")
    return found


def _hashed(texts: Sequence[str]) -> Any:
    """Hashed n-grams, sparse (n, 32768)."""
    from scipy import sparse

    rows = [hashed_text(text, BUCKETS, SIZES) for text in texts]
    ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns, values = (np.concatenate(side) for side in zip(*rows, strict=True))
    return sparse.csr_matrix((values, columns, ends), shape=(len(texts), BUCKETS))


def _fit_teacher(texts: Sequence[str], unhappy: NDArray[np.bool_], embed: Embed) -> Callable[[Sequence[str]], Floats]:
    """P(dissatisfied) from embeddings and n-grams together: held-out accuracy was 0.04 above embeddings alone."""
    from scipy import sparse

    def features(some: Sequence[str]) -> Any:
        return sparse.hstack([sparse.csr_matrix(_embedded(embed, some)), _hashed(some)]).tocsr()

    model = _logistic(features(texts), unhappy, None, TEACHER_C)
    return lambda some: np.asarray(model.predict_proba(features(some))[:, 1])


def _logistic(features: Any, labels: Any, weights: Floats | None, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # L-BFGS on vectors of 32,768: on a busy machine BLAS's threads made this ten times slower.
    with threadpool_limits(1, user_api="blas"):
        return LogisticRegression(C=strength, max_iter=2000).fit(features, labels, sample_weight=weights)


def _with_copies(texts: Sequence[str], seed: int) -> tuple[list[str], NDArray[np.int64]]:
    """The texts and noisy copies of each, with the place of the text that each comes from."""
    draw = np.random.default_rng(seed)
    sources = np.concatenate([np.arange(len(texts)), np.repeat(np.arange(len(texts)), COPIES)])
    return [*texts, *(add_noise(text, draw) for text in texts for _ in range(COPIES))], sources


def add_noise(text: str, draw: np.random.Generator) -> str:
    """One change that leaves the mood alone: case, apostrophes, closing marks, an opener, a slip of the finger."""
    kind = int(draw.integers(6))
    at = int(draw.integers(1, max(len(text) - 1, 2)))
    if kind == 0:
        return text.lower().replace("'", "")
    if kind == 1:
        return str(draw.choice(OPENERS)) + text
    if kind == 2 and len(text) > 5:
        return text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    if kind == 3 and len(text) > 5:
        return text[:at] + text[at + 1 :]
    if kind == 4:
        return (text.rstrip("?.!") or text) + str(draw.choice(["", "!", "...", "!!", "."]))
    return text.upper() if draw.random() < 0.3 else text.capitalize()


def _fit_student(texts: Sequence[str], targets: Floats) -> EscalationDetector:
    """A logistic regression on hashed n-grams with probabilities as targets: each text once for, once against."""
    from scipy import sparse

    rows = _hashed(texts)
    labels, weights = np.repeat([1, 0], len(texts)), np.concatenate([targets, 1 - targets])
    model = _logistic(sparse.vstack([rows, rows]), labels, weights, STUDENT_C)
    return EscalationDetector(model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def _measure(
    detector: EscalationDetector,
    of_teacher: Floats,
    texts: Sequence[str],
    unhappy: NDArray[np.bool_],
    groups: Sequence[str],
    seed: int,
    **known: Any,
) -> EscalationReport:
    def share(flags: NDArray[np.bool_], of: NDArray[np.bool_] | None = None) -> stats.Proportion:
        among = np.ones(len(flags), dtype=bool) if of is None else of
        return stats.Proportion.of(flags[among], _where(groups, among))

    scores, seconds = np.zeros(len(texts)), np.zeros(len(texts))
    for index, text in enumerate(texts):
        start = time.perf_counter()
        scores[index] = detector.score(text)
        seconds[index] = time.perf_counter() - start
    said, teacher_said = scores >= 0.5, of_teacher >= 0.5
    pairs = np.column_stack([scores, unhappy])
    return EscalationReport(
        held_out=len(texts),
        held_out_groups=len(set(groups)),
        accuracy=share(said == unhappy),
        recall_dissatisfied=share(said, unhappy),
        false_alarms=share(said, ~unhappy),
        majority=stats.majority_baseline(unhappy.tolist()),
        balanced_accuracy=stats.balanced_accuracy(unhappy.tolist(), said.tolist()),
        auroc=stats.bootstrap(pairs, lambda rows: stats.auroc(rows[:, 0], rows[:, 1]), seed),
        teacher_accuracy=share(teacher_said == unhappy),
        teacher_recall=share(teacher_said, unhappy),
        agreement=share(said == teacher_said),
        milliseconds_median=round(1000 * float(np.median(seconds)), 4),
        mistakes=tuple(_where(texts, said != unhappy)[:20]),
        **known,
    )
