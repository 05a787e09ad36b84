import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.artifacts import file_sha256
from cogumi_dagster.lib.compression import gguf_export
from cogumi_dagster.lib.compression.gguf_export import export_gguf, quantize_gguf, write_gguf, written_aside
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.training.student import load_checkpoint


def test_metadata_template_and_provenance_are_written(student: Path, tmp_path: Path) -> None:
    write_gguf(student, tmp_path / "f32.gguf", type="F32", provenance={"parent_sha256": "abc"})
    file = open_gguf(tmp_path / "f32.gguf")
    _, tokenizer = load_checkpoint(student)
    assert file.metadata["cogumi.parent_sha256"] == "abc"
    assert file.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert file.metadata["tokenizer.ggml.pre"] == "smollm"
    assert file.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert {kind for _, kind, _ in file.tensors()} == {"F32"}


def test_quantizing_reports_what_was_stored(f16_gguf: Path, tmp_path: Path) -> None:
    report = quantize_gguf(f16_gguf, tmp_path / "q.gguf", "Q8_0")
    assert report.bytes == (tmp_path / "q.gguf").stat().st_size
    assert set(report.tensor_types) == {"F32", "Q8_0"}
    assert report.parameters == sum(report.tensor_types.values())
    assert report.bits_per_weight == pytest.approx(8 * report.bytes / report.parameters)


def test_an_unknown_type_or_a_refused_file_is_an_error(f16_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="unknown quantization 'Q5_KM'") as caught:
        quantize_gguf(f16_gguf, tmp_path / "q.gguf", "Q5_KM")
    assert caught.value.mend == "did you mean 'Q5_K_M'?"
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(CogumiError, match=r"llama\.cpp could not quantize"):
        quantize_gguf(tmp_path / "bad.gguf", tmp_path / "q.gguf", "Q8_0")


@pytest.mark.parametrize(("type", "stored"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("Q8_0", "Q8_0")])
def test_a_checkpoint_is_exported_in_one_go(student: Path, tmp_path: Path, type: str, stored: str) -> None:
    report = export_gguf(student, tmp_path / "new" / "out.gguf", type)
    assert set(report.tensor_types) == {"F32", stored}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.gguf"]
    metadata = open_gguf(tmp_path / "new" / "out.gguf").metadata
    assert metadata["cogumi.parent_sha256"] == file_sha256(student / "model.safetensors")
    assert metadata["cogumi.tokenizer_sha256"] == file_sha256(student / "tokenizer.json")


@pytest.mark.parametrize("write", [write_gguf, export_gguf])
def test_an_unknown_type_is_refused_before_anything_is_read(write: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="'F17'") as caught:
        write(tmp_path / "absent", tmp_path / "out.gguf", type="F17")
    assert caught.value.mend == "did you mean 'F16'?"


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_aside(out) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert out.read_text() == "old"
    with written_aside(out) as path:
        path.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_one_tensor_at_a_time_is_in_memory(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = gguf_export._stored, []

    def watched(checkpoint: Path, name: str, tensor: Any, type: str) -> Any:
        seen.append(weakref.ref(tensor))
        assert sum(found() is not None for found in seen) <= 1
        return store(checkpoint, name, tensor, type)

    monkeypatch.setattr(gguf_export, "_stored", watched)
    write_gguf(student, tmp_path / "out.gguf")
    assert len(seen) > 10
