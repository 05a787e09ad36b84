"""A tiny random Llama with the real tokenizer, made once a session: checkpoint, GGUF files, adapters, an engine."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.inference.base import Completion, Message
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import StudentReport, import_student, load_checkpoint, save_checkpoint
from cogumi_dagster.lib.training.trim import trim_vocabulary

LOUD = 6.0
"""Random Llamas are drawn with standard deviation 0.02 and say nearly the same whatever their attention does;
six times that, a wrong permutation or a lost adapter moves the logits by far more than a rounding error."""

TINY_LORA = LoraConfig(
    rank_attention=4, rank_feed_forward=2, alpha=8, dropout=0.0, learning_rate=3e-2, max_steps=2, batch_tokens=256,
    max_length=128, load_in_4bit=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_instance_left_behind() -> Iterator[None]:
    """An instance that is entered twice leaves its state storage behind as the current one, dead: Dagster keeps one
    exit stack for both. The next load of the code location would then fail, in another test."""
    from dagster._core.storage.defs_state.base import set_defs_state_storage

    with set_defs_state_storage(None):
        yield


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudentReport]:
    """The checkpoint that ``import_student`` writes, and its report."""
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    return folder, import_student("random:2x64", "tiny", folder, strings=40)


@pytest.fixture(scope="session")
def make_loud() -> Callable[..., Path]:
    """checkpoint, folder -> a copy with larger weights in every linear layer, tied or not."""

    def make(source: Path, out: Path, *, tied: bool = True) -> Path:
        import torch

        model, tokenizer = load_checkpoint(source, "float32")
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(LOUD)
                elif "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            if not tied:
                model.config.tie_word_embeddings = False
                head = model.lm_head.weight.detach().clone()
                model.lm_head.weight = torch.nn.Parameter(head.flip(0) + 0.02 * torch.randn_like(head))
        save_checkpoint(model.bfloat16(), tokenizer, out)
        return out

    return make


@pytest.fixture(scope="session")
def full_student(
    imported: tuple[Path, StudentReport], make_loud: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The imported student, loud, with its whole vocabulary."""
    return make_loud(imported[0], tmp_path_factory.mktemp("full") / "checkpoint")


@pytest.fixture(scope="session")
def full_untied_student(
    imported: tuple[Path, StudentReport], make_loud: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_loud(imported[0], tmp_path_factory.mktemp("full-untied") / "checkpoint", tied=False)


@pytest.fixture(scope="session")
def student(full_student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student, loud, its vocabulary trimmed to ``pairs``: 49,152 tokens make every GGUF take seconds."""
    folder = tmp_path_factory.mktemp("student") / "checkpoint"
    trim_vocabulary(full_student, pairs, pairs[:1], folder)
    return folder


@pytest.fixture(scope="session")
def untied_student(full_untied_student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied") / "checkpoint"
    trim_vocabulary(full_untied_student, pairs, pairs[:1], folder)
    return folder


@pytest.fixture(scope="session")
def f16_gguf(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cogumi_dagster.lib.compression.gguf_export import write_gguf

    path = tmp_path_factory.mktemp("gguf") / "f16.gguf"
    write_gguf(student, path)
    return path


@pytest.fixture(scope="session")
def quantized_gguf(f16_gguf: Path) -> Path:
    from cogumi_dagster.lib.compression.gguf_export import quantize_gguf

    path = f16_gguf.with_name("q8_0.gguf")
    quantize_gguf(f16_gguf, path, "Q8_0")
    return path


@pytest.fixture(scope="session")
def wide_student(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512 columns, which K-quants divide; a small vocabulary, so that the layers decide the size."""
    folder = tmp_path_factory.mktemp("wide")
    import_student("random:2x256", "wide", folder / "whole", strings=1)
    trim_vocabulary(folder / "whole", pairs, pairs[:1], folder / "trimmed")
    return folder / "trimmed"


@pytest.fixture(scope="session")
def wide_gguf(wide_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cogumi_dagster.lib.compression.gguf_export import write_gguf

    path = tmp_path_factory.mktemp("wide") / "f16.gguf"
    write_gguf(wide_student, path)
    return path


@pytest.fixture(scope="session")
def wide_imatrix(wide_student: Path, pairs: list[Pair]) -> Any:
    from cogumi_dagster.lib.compression.imatrix import collect_imatrix

    return collect_imatrix(*load_checkpoint(wide_student, "float32"), pairs)


@pytest.fixture(scope="session")
def lora_config() -> LoraConfig:
    return TINY_LORA


@pytest.fixture(scope="session")
def adapter(student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter trained two steps on ``student``."""
    from cogumi_dagster.lib.training.lora import train_lora

    folder = tmp_path_factory.mktemp("adapter")
    train_lora(student, pairs, folder / "adapter", TINY_LORA, scratch=folder / "scratch")
    return folder / "adapter"


@pytest.fixture(scope="session")
def opposite_adapter(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``adapter`` with the sign of every B turned: it says something else than ``adapter`` and than the base."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("opposite") / "adapter"
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(turned, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Short questions with their answers, of different lengths."""
    words = ["river", "stone", "cloud", "table", "seven", "green", "window", "paper"]
    return [
        Pair(
            f"What is {n} plus {n}?",
            f"{n} plus {n} makes {2 * n}, says the {words[n % 8]}{' again' * (n % 5)}.",
            "sums",
        )
        for n in range(24)
    ]


class ScriptedEngine:
    """Says what ``script`` says for (adapter, prompt); counts what it was asked. Ten sure tokens an answer."""

    def __init__(self, script: Callable[[str | None, str], str], adapters: tuple[str, ...] = ()) -> None:
        self.script = script
        self.adapters = adapters
        self.slots = 1
        self.asked: list[tuple[str | None, str]] = []

    def chat(self, messages: Sequence[Message], *, adapter: str | None = None, **options: Any) -> Completion:
        prompt = messages[-1]["content"]
        self.asked.append((adapter, prompt))
        text = self.script(adapter, prompt)
        return Completion(text, "stop", len(prompt.split()), 10, (-0.1,) * 10, 0.01, adapter)

    def chat_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapter: str | None = None,
        max_tokens: int | Sequence[int] = 256,
        progress: Callable[[int, int, str], None] = lambda done, total, note: None,
        **options: Any,
    ) -> list[Completion]:
        if not isinstance(max_tokens, int):
            assert len(max_tokens) == len(conversations)
        answers = []
        for number, messages in enumerate(conversations, 1):
            answers.append(self.chat(messages, adapter=adapter))
            progress(number, len(conversations), "10 tokens")
        return answers

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def scripted_engine() -> Callable[..., ScriptedEngine]:
    return ScriptedEngine


@pytest.fixture(scope="session")
def solutions() -> Callable[[Sequence[Any]], Mapping[str, str]]:
    """tasks -> prompt: the solver's answer (what a perfect engine says)."""
    return lambda tasks: {task.prompt: task.solution or "" for task in tasks}
