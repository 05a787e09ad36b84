from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.compression.calibration import read_calibration
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix
from cogumi_dagster.lib.compression.mix import candidates, read_layout
from cogumi_dagster.lib.compression.quantize import (
    KINDS,
    export_weighted,
    quantize_file,
    quantize_source,
    unquantize_file,
)
from cogumi_dagster.lib.compression.sensitivity import KlMeter
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint, load_gguf


def types_in(gguf: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in open_gguf(gguf).reader.tensors}


def test_without_matrix_and_types_it_is_llama_cpps_own_file(wide_gguf: Path, tmp_path: Path) -> None:
    quantize_gguf(wide_gguf, tmp_path / "theirs.gguf", "Q4_K_M")
    report = quantize_file(wide_gguf, tmp_path / "ours.gguf", "Q4_K_M")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert report.type == "Q4_K_M" and report.bytes == (tmp_path / "ours.gguf").stat().st_size


def test_unquantized_are_the_served_weights_in_16_bit(wide_gguf: Path, tmp_path: Path) -> None:
    served, whole = tmp_path / "q.gguf", tmp_path / "f16.gguf"
    quantize_file(wide_gguf, served, "Q5_0")
    unquantize_file(served, whole)
    assert set(types_in(whole).values()) == {"F16", "F32"}
    stored = {name: values for name, _, values in open_gguf(whole).tensors()}
    for name, _, values in open_gguf(served).tensors():
        assert abs(stored[name] - values).max() <= abs(values).max() / 1024, name
    with pytest.raises(CogumiError, match="could not quantize"):
        unquantize_file(tmp_path / "none.gguf", whole)


def test_every_tensor_gets_the_type_that_was_asked_for(wide_gguf: Path, wide_imatrix: Imatrix, tmp_path: Path) -> None:
    options = candidates(read_layout(wide_gguf), KINDS)
    asked = {name: kinds[number % len(kinds)] for number, (name, kinds) in enumerate(options.items())}
    assert len(set(asked.values())) > 10 and "F16" in asked.values()
    report = quantize_file(wide_gguf, tmp_path / "q.gguf", "Q4_0", imatrix=wide_imatrix, types=asked)
    stored = types_in(tmp_path / "q.gguf")
    assert {name: stored[name] for name in asked} == asked
    assert report.type == "mixed"
    metadata = open_gguf(tmp_path / "q.gguf").metadata
    assert metadata["quantize.imatrix.entries_count"] == len(wide_imatrix.sums)
    assert metadata["tokenizer.chat_template"] == open_gguf(wide_gguf).metadata["tokenizer.chat_template"]


def test_a_matrix_of_another_model_is_refused(f16_gguf: Path, wide_imatrix: Imatrix, tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="the importance matrix has 256 columns"):
        quantize_file(f16_gguf, tmp_path / "q.gguf", "Q4_0", imatrix=wide_imatrix)
    with pytest.raises(CogumiError, match="unknown quantization 'Q5_KM'"):
        quantize_file(f16_gguf, tmp_path / "q.gguf", "Q5_KM")
    assert list(tmp_path.iterdir()) == []


def test_a_mix_is_nearer_to_the_model_than_llama_cpps_of_the_same_size(
    student: Path, f16_gguf: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    mixed, plain = tmp_path / "mixed.gguf", tmp_path / "plain.gguf"
    budget = quantize_gguf(f16_gguf, plain, "Q5_0").bytes
    export, mix = quantize_source(f16_gguf, mixed, budget, pairs)
    assert export.bytes == mixed.stat().st_size <= budget
    assert 0 <= mix.predicted_bytes - export.bytes <= 1024
    meter = KlMeter(*load_checkpoint(student, "float32"), pairs)
    stored = [{n: v for n, _, v in open_gguf(path).tensors() if v.ndim == 2} for path in (mixed, plain)]
    ours, theirs = (meter.measure(values) for values in stored)
    assert ours == pytest.approx(mix.measured_loss, rel=1e-3)
    assert 0.4 < mix.predicted_loss / mix.measured_loss < 2.5
    assert ours < theirs


def test_a_checkpoint_and_its_gguf_give_the_same_file(
    student: Path, f16_gguf: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    from_folder, _ = quantize_source(student, tmp_path / "a.gguf", 120_000, pairs)
    from_file, _ = quantize_source(f16_gguf, tmp_path / "b.gguf", 120_000, pairs)
    assert from_folder.bytes <= 120_000
    assert types_in(tmp_path / "a.gguf") == types_in(tmp_path / "b.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    assert set(from_file.tensor_types) == set(from_folder.tensor_types)


@pytest.mark.parametrize(
    ("budget", "problem"), [(10_000, "cannot be met: the smallest mix of this model"), (0, "cannot be met")]
)
def test_an_impossible_budget_is_refused_at_once(
    student: Path, pairs: list[Pair], tmp_path: Path, budget: int, problem: str
) -> None:
    with pytest.raises(CogumiError, match=problem):
        quantize_source(student, tmp_path / "q.gguf", budget, pairs[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_is_refused(quantized_gguf: Path, pairs: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="is quantized already") as caught:
        quantize_source(quantized_gguf, tmp_path / "q.gguf", 10**9, pairs)
    assert "16-bit parent" in caught.value.mend


def test_a_gguf_runs_as_the_model_that_it_holds(student: Path, f16_gguf: Path, pairs: list[Pair]) -> None:
    outputs: list[Any] = [answer_logits(*load(), pairs[:6], 512) for load in (
        lambda: load_checkpoint(student, "float32"), lambda: load_gguf(f16_gguf),
    )]  # fmt: skip
    assert parity(*outputs).mean_kl < 1e-5


def test_a_checkpoint_is_exported_with_a_matrix_of_given_text(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    report, imatrix = export_weighted(student, tmp_path / "q.gguf", "Q5_0", calibration=pairs, dataset="sums")
    again, _ = export_weighted(student, tmp_path / "again.gguf", "Q5_0", imatrix=imatrix)
    assert report.sha256 == again.sha256 and report.type == "Q5_0"
    _, tokenizer = load_checkpoint(student)
    model = answer_logits(*load_checkpoint(student, "float32"), pairs[:6], 512)
    served = flatten(gguf_answer_logits(tmp_path / "q.gguf", tokenizer, pairs[:6]))
    assert parity(flatten(model), served).mean_kl < 3e-2


def test_calibration_text_is_packaged_or_a_users_own(tmp_path: Path) -> None:
    packaged, name = read_calibration(None)
    assert len({pair.group for pair in packaged}) > 20 and name == "cogumi's packaged tasks"
    write_jsonl(tmp_path / "mine.jsonl", [{"instruction": "a?", "response": "b"}, {"instruction": "c?"}])
    assert read_calibration(tmp_path / "mine.jsonl") == ([Pair("a?", "b", "")], "mine.jsonl")
    write_jsonl(tmp_path / "none.jsonl", [{"instruction": "c?"}])
    with pytest.raises(CogumiError, match=r"no row of .* has an answer"):
        read_calibration(tmp_path / "none.jsonl")
    with pytest.raises(CogumiError, match="there is no file"):
        read_calibration(tmp_path / "absent.jsonl")
