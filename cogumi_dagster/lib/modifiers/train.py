"""Train a modifier on the very weights that are served: the GGUF, dequantized."""

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl
from cogumi_dagster.lib.modifiers.failures import SUCCESSES
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.tasks.base import Task
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.launch import train_lora_on
from cogumi_dagster.lib.training.lora import TrainingReport

VALIDATION_SHARE = 0.1
REPLAY = "replay"
ROWS, SIBLINGS, REHEARSAL = "rows.jsonl", "siblings.jsonl", "rehearsal.jsonl"
"""Files of a cascade's artifact; the last two are only there where the profile wants any."""


def train_on_served_weights(
    gguf: Path,
    tokenizer_from: Path,
    pairs: Sequence[Pair],
    out: Path,
    config: LoraConfig,
    *,
    scratch: Path,
    device: str,
    processes: int = 1,
    seed: int,
    balance: bool = False,
    progress: Progress = silent,
    section: str,
) -> TrainingReport:
    """Dequantize ``gguf`` into ``scratch`` (once) and train a LoRA on it; a tenth of the pairs is validation.

    ``balance``: see ``balanced``. ``section`` of the profile, which ``config`` is, is named in errors.

    Raises:
        CogumiError: fewer than two pairs; what ``train_lora`` raises.
    """
    if len(pairs) < 2:
        raise CogumiError(
            f"there are only {len(pairs)} lessons to train on and to validate with",
            "look at what the teachers' answers were dropped for, upstream of this adapter",
        )
    served = scratch / "served"
    if not (served / "model.safetensors").is_file():
        aside = scratch / f".served-{os.getpid()}"
        dequantize_checkpoint(gguf, tokenizer_from, aside)
        shutil.rmtree(served, ignore_errors=True)
        os.replace(aside, served)
    train, validation = split_lessons(pairs, seed)
    return train_lora_on(
        processes,
        served,
        balanced(train) if balance else train,
        out,
        config,
        validation=validation,
        scratch=scratch / "steps",
        device=device,
        seed=seed,
        progress=progress,
        section=section,
    )


def split_lessons(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """(to train on, to validate on). Lessons with one answer, word for word, are on one side: two problems with the
    same solution are the same lesson twice."""
    alike: dict[str, list[Pair]] = {}
    for pair in pairs:
        alike.setdefault(pair.response, []).append(pair)
    if len(alike) < 2:
        return list(pairs[1:]), list(pairs[:1])
    order = list(alike.values())
    random.Random(seed).shuffle(order)
    wanted = max(round(VALIDATION_SHARE * len(pairs)), min(map(len, order)))
    train: list[Pair] = []
    validation: list[Pair] = []
    for group in order:
        (validation if len(validation) + len(group) <= wanted else train).extend(group)
    return train, validation


MOST_REPEATS = 3


def balanced(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of smaller groups again, up to the size of a mean group and ``MOST_REPEATS`` times at most; not replay."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.group != REPLAY:
            groups.setdefault(pair.group, []).append(pair)
    mean = sum(map(len, groups.values())) / max(1, len(groups))
    again = [
        group[at % len(group)]
        for group in groups.values()
        for at in range(len(group), min(round(mean), MOST_REPEATS * len(group)))
    ]
    return [*pairs, *again]


def task_pairs(path: Path) -> list[Pair]:
    """Tasks with their exact solutions, as training pairs."""
    return [Pair(row["prompt"], row["solution"], row["family"]) for row in read_jsonl(path)]


def read_rows(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The rows of those files that are there, in that order."""
    return [row for name in names if (folder / name).is_file() for row in read_jsonl(folder / name)]


def answered_rows(cascade: Path) -> list[dict[str, Any]]:
    """What a cascade's artifact teaches: the failures' accepted answers, and their siblings."""
    return read_rows(cascade, ROWS, SIBLINGS)


def replayed_rows(failures: Path, cascade: Path) -> list[dict[str, Any]]:
    """What may be replayed: the tasks that the base got right, and what the cascade's artifact rehearses."""
    return [*read_rows(failures, SUCCESSES), *read_rows(cascade, REHEARSAL)]


def modifier_pairs(
    cascade: Sequence[dict[str, Any]], replayed: Sequence[dict[str, Any]], replay_share: float, seed: int
) -> list[Pair]:
    """What the modifier learns: the cascade's verified answers, grouped by their pattern of failures, and a replay of
    tasks that the base got right and of what is rehearsed (see ``replayed_answer``)."""
    lessons = [Pair(row["task"]["prompt"], row["response"], f"pattern {row['cluster']}") for row in cascade]
    again = list(replayed)
    random.Random(seed).shuffle(again)
    keep = min(len(again), round(replay_share * len(lessons) / max(1e-9, 1 - replay_share)))
    return lessons + [Pair(row["task"]["prompt"], replayed_answer(row), REPLAY) for row in again[:keep]]


def taught(cascade: Sequence[dict[str, Any]], replayed: Sequence[dict[str, Any]]) -> list[tuple[Task, str]]:
    """All tasks that a modifier may have learned from, each with the answer that is taught."""
    answers = [(row, row["response"]) for row in cascade] + [(row, replayed_answer(row)) for row in replayed]
    return [(Task.from_json(row["task"]), answer) for row, answer in answers]


def replayed_answer(replayed: Mapping[str, Any]) -> str:
    """What is taught of a task that is replayed: the exact solution where there is one, else the answer beside it.

    A right answer may come out of wrong steps: of 44 circuits that the untrained SmolLM2-135M answered rightly, not one
    was worked out as it should be.
    """
    return str(replayed["task"].get("solution") or replayed["response"])
