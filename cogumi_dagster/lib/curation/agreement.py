"""How far a judge agrees with labels given by hand: a small set of answers, good and bad, over the six domains.

One annotator wrote the labels, so agreement says whether a judge sees what a careful reader sees, not more.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import Estimate, Floats, Proportion, bootstrap, majority_baseline
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.teaching.teach import ResponseRow, VerdictRow

AGREEMENT_SET = Path(__file__).resolve().parents[3] / "resources" / "judge_agreement.jsonl"
THRESHOLD = 7.0
"""The specification's: answers below it are dropped."""


@dataclass(frozen=True)
class Labelled:
    """An answer as the judge gets it, and the total, 0 to 10, that a reader gave it."""

    row: ResponseRow
    total: float


@dataclass(frozen=True)
class JudgeAgreement:
    """A judge against the labels. Estimates carry a bootstrap 95 % interval, shares a Wilson one."""

    items: int
    scored: int
    """Items that the judge scored; the figures are of these."""
    mean_difference: Estimate | None
    """Judge minus label: above 0 the judge is kinder."""
    mean_absolute_difference: Estimate | None
    spearman: Estimate | None
    same_side: Proportion
    """Items on which both say "at least 7" or both say "less"."""
    majority: Proportion
    """What always saying the labels' commoner side would get."""
    kept_though_bad: int
    dropped_though_good: int


def read_labelled(path: Path = AGREEMENT_SET) -> list[Labelled]:
    """The labelled set. Raises CogumiError for a line that lacks a field."""
    return [_labelled(path, number, row) for number, row in enumerate(read_jsonl(path), 1)]


def _labelled(path: Path, number: int, row: dict[str, Any]) -> Labelled:
    try:
        task = Task(row["domain"], "judge_agreement", row["difficulty"], row["prompt"])
        verdict = VerdictRow(passed=row["passed"], reason="", score=float(row["passed"] is True))
        answer = ResponseRow(
            task=task.to_json(), teacher="labelled", tier=0, response=row["response"], verdict=verdict,
            finish_reason=row["finish_reason"], prompt_tokens=0, completion_tokens=0, usd=0.0, stand_in=False,
        )  # fmt: skip
        return Labelled(answer, float(sum(row["scores"].values())))
    except KeyError as error:
        raise CogumiError(f"{path}: line {number} lacks {error}", f"give it: {json.dumps(row)[:80]}...") from None


def agreement(totals: Sequence[float | None], labelled: Sequence[Labelled]) -> JudgeAgreement:
    """Compare a judge's totals (None where it gave none) with the labels of the same items."""
    pairs = np.array([(t, item.total) for t, item in zip(totals, labelled, strict=True) if t is not None])
    pairs = pairs.reshape(-1, 2)
    judge, label = pairs[:, 0] >= THRESHOLD, pairs[:, 1] >= THRESHOLD
    estimate = partial(bootstrap, pairs, seed=0) if len(pairs) else None
    return JudgeAgreement(
        items=len(labelled),
        scored=len(pairs),
        mean_difference=estimate(lambda p: float((p[:, 0] - p[:, 1]).mean())) if estimate else None,
        mean_absolute_difference=estimate(lambda p: float(np.abs(p[:, 0] - p[:, 1]).mean())) if estimate else None,
        spearman=estimate(spearman) if estimate else None,
        same_side=Proportion(int((judge == label).sum()), len(pairs)),
        majority=majority_baseline(label.tolist()),
        kept_though_bad=int((judge & ~label).sum()),
        dropped_though_good=int((~judge & label).sum()),
    )


def spearman(pairs: Floats) -> float:
    """Spearman's rank correlation of two columns (n, 2), ties sharing a mean rank; NaN for a constant column."""
    from scipy.stats import rankdata

    first, second = (rankdata(pairs[:, column]) - (len(pairs) + 1) / 2 for column in (0, 1))
    spread = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / spread if spread else math.nan
