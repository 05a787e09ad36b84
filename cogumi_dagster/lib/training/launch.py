"""Training in several processes: torchrun starts them, accelerate connects them, the first one reports."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.lora import TrainingReport, train_lora
from cogumi_dagster.lib.training.workers import Workers

PROGRESS = "cogumi-progress "
REPORT, ERROR = "report.pickle", "error.json"


def train_lora_on(
    processes: int,
    checkpoint: Path,
    pairs: Sequence[Pair],
    out: Path,
    config: LoraConfig,
    *,
    validation: Sequence[Pair] = (),
    scratch: Path,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    section: str = "training",
) -> TrainingReport:
    """``train_lora`` in so many processes of this machine, one GPU each where ``device`` is cuda.

    Raises:
        CogumiError: what ``train_lora`` raises; fewer GPUs than processes; a process that died.
    """
    if processes == 1:
        return train_lora(
            checkpoint, pairs, out, config, validation=validation, scratch=scratch, device=device, seed=seed,
            progress=progress, section=section,
        )  # fmt: skip
    _require_gpus(processes, device)
    scratch.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, ERROR):
        (scratch / name).unlink(missing_ok=True)
    job = {
        "checkpoint": str(checkpoint), "out": str(out), "scratch": str(scratch), "device": device, "seed": seed,
        "section": section,
        "config": config.model_dump(mode="json"),
        "pairs": [asdict(pair) for pair in pairs],
        "validation": [asdict(pair) for pair in validation],
    }  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job))
    said = _run(processes, scratch / "job.json", progress)
    if (scratch / ERROR).is_file():
        raise CogumiError(**json.loads((scratch / ERROR).read_text()))
    if not (scratch / REPORT).is_file():
        raise CogumiError(f"a training process died: {said}", "run again: it resumes from the last checkpoint")
    report: TrainingReport = pickle.loads((scratch / REPORT).read_bytes())
    return report


def _require_gpus(processes: int, device: str) -> None:
    import torch

    if device.startswith("cuda") and torch.cuda.device_count() < processes:
        raise CogumiError(
            f"compute.processes is {processes}, but there are {torch.cuda.device_count()} GPUs",
            "set compute.processes to the number of GPUs",
        )


def _run(processes: int, job: Path, progress: Progress) -> str:
    """Start the processes, pass on the first one's progress, and return the last lines of what they said."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "cogumi_dagster.lib.training.launch", str(job),
    ]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    ) as running:  # fmt: skip
        assert running.stdout is not None
        try:
            for line in running.stdout:
                if line.startswith(PROGRESS):
                    progress(*json.loads(line.removeprefix(PROGRESS)))
                else:
                    said = [*said[-20:], line.rstrip()]
        except BaseException:
            running.terminate()
            raise
    return " / ".join(said[-5:])


def _report_progress(done: int, total: int, note: str = "") -> None:
    print(PROGRESS + json.dumps([done, total, note]), flush=True)


def main(path: Path) -> None:
    """One process of a job."""
    job: dict[str, Any] = json.loads(path.read_text())
    device = job["device"]
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    workers = Workers.of_this_process(device)
    scratch = Path(job["scratch"])
    try:
        report = train_lora(
            Path(job["checkpoint"]),
            [Pair(**pair) for pair in job["pairs"]],
            Path(job["out"]),
            LoraConfig.model_validate(job["config"]),
            validation=[Pair(**pair) for pair in job["validation"]],
            scratch=scratch,
            device=device,
            seed=job["seed"],
            progress=_report_progress if workers.rank == 0 else silent,
            workers=workers,
            section=job["section"],
        )
    except CogumiError as error:
        # whoever fails first says so: torchrun ends the others at once
        aside = scratch / f"{ERROR}.{workers.rank}"
        aside.write_text(json.dumps({"problem": error.problem, "mend": error.mend, "retryable": error.retryable}))
        os.replace(aside, scratch / ERROR)
        raise
    if workers.rank == 0:
        (scratch / REPORT).write_bytes(pickle.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
