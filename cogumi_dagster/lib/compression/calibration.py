"""The text that importance matrices and sensitivities are measured on."""

from itertools import islice
from pathlib import Path

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.batches import Pair

PACKAGED_TASKS = 160
"""About 20,000 tokens: more than a calibration takes."""

MAX_ROWS = 5000


def read_calibration(file: Path | None) -> tuple[list[Pair], str]:
    """(questions with answers, a name for them) of a file that ``cogumi curate`` reads; packaged tasks without one.

    Raises:
        CogumiError: no such file, or no row of it has an answer.
    """
    if file is None:
        return packaged_calibration(), "cogumi's packaged tasks"
    from cogumi_dagster.lib.curation.records import read_records

    if not file.is_file():
        raise CogumiError(f"there is no file {file}", "check the path")
    pairs = [
        Pair(record.instruction, record.response, record.domain or "")
        for record in islice(read_records(file), MAX_ROWS)
        if record.response
    ]
    if not pairs:
        raise CogumiError(f"no row of {file} has an answer", "give questions with their answers, as for cogumi curate")
    return pairs, file.name


def packaged_calibration(count: int = PACKAGED_TASKS) -> list[Pair]:
    """Tasks of every packaged family with the solver's answers, from the training split."""
    from cogumi_dagster.lib.tasks import FAMILIES, draw_tasks

    tasks = draw_tasks(tuple(FAMILIES), count, 0, "train")
    return [Pair(task.prompt, task.solution, task.family) for task in tasks if task.solution]
