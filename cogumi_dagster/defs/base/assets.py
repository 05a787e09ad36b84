"""The student, its training and the merged checkpoint."""

from cogumi_dagster.defs.artifact import Step, artifact
from cogumi_dagster.defs.base import checks
from cogumi_dagster.defs.dataset.assets import distillation_dataset
from cogumi_dagster.lib.curation.dataset import training_pairs
from cogumi_dagster.lib.training.launch import train_lora_on
from cogumi_dagster.lib.training.lora import TrainingReport
from cogumi_dagster.lib.training.merge import MergeReport, merge_adapter
from cogumi_dagster.lib.training.student import StudentReport, import_student
from cogumi_dagster.lib.training.trim import TrimReport, trim_vocabulary


@artifact(group="base", kinds={"huggingface", "safetensors"}, config=("student",), claims=checks.STUDENT_MODEL)
def student_model(step: Step) -> StudentReport:
    """The pretrained student as a 16-bit checkpoint, with a tokenizer that gives llama.cpp's ids."""
    student = step.profile.student
    return import_student(student.source, student.name, step.out, seed=step.profile.seed)


@artifact(
    group="base",
    kinds={"huggingface", "safetensors"},
    config=("student.trim_vocabulary", "student.trim_keep"),
    deps=[student_model, distillation_dataset],
    claims=checks.TRIMMED_STUDENT,
    code_version="2",
)
def trimmed_student(step: Step) -> TrimReport:
    """The student with its vocabulary cut to what the dataset needs and ``student.trim_keep`` of the commonest
    tokens, with bytes, special tokens, and the closure of the BPE merges. Trained on only where the profile sets
    student.trim_vocabulary."""
    data = step.path("distillation_dataset")
    return trim_vocabulary(
        step.path("student_model"),
        training_pairs(data / "train.jsonl"),
        training_pairs(data / "validation.jsonl"),
        step.out,
        keep=step.profile.student.trim_keep,
    )


def trained_student(step: Step) -> str:
    return "trimmed_student" if step.profile.student.trim_vocabulary else "student_model"


@artifact(
    group="base",
    kinds={"pytorch", "peft"},
    config=("training", "compute.device", "student.trim_vocabulary"),
    deps=[student_model, trimmed_student, distillation_dataset],
    claims=checks.BASE_ADAPTER,
    pool="gpu",
)
def base_adapter(step: Step) -> TrainingReport:
    """The QLoRA adapter: the student in NF4, rank 64 on attention and 32 on feed-forward, loss on answers only.
    Resumable: a killed run continues from its newest valid checkpoint."""
    data = step.path("distillation_dataset")
    return train_lora_on(
        step.profile.compute.processes,
        step.path(trained_student(step)),
        training_pairs(data / "train.jsonl"),
        step.out,
        step.profile.training,
        validation=training_pairs(data / "validation.jsonl"),
        scratch=step.scratch,
        device=step.compute.device,
        seed=step.profile.seed,
        progress=step.progress,
    )


@artifact(
    group="base",
    kinds={"pytorch", "safetensors"},
    config=("student.trim_vocabulary",),
    deps=[student_model, trimmed_student, base_adapter, distillation_dataset],
    claims=checks.BASE_CHECKPOINT,
)
def base_checkpoint(step: Step) -> MergeReport:
    """The adapter merged into the 16-bit student, held against base + adapter on the same prompts."""
    held_out = training_pairs(step.path("distillation_dataset") / "validation.jsonl")
    return merge_adapter(
        step.path(trained_student(step)),
        step.path("base_adapter"),
        step.out,
        held_out[:24],
        max_length=step.profile.training.max_length,
    )


ASSETS = [student_model, trimmed_student, base_adapter, base_checkpoint]
