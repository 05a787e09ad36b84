from pathlib import Path

import pytest
from gguf import GGUFReader

from cogumi_dagster.lib.compression.gguf_export import GENERAL_FILE_TYPES, quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.predict import predict_bytes, tensor_types
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.student import import_student
from cogumi_dagster.lib.training.trim import trim_vocabulary

Shapes = dict[str, tuple[int, ...]]


def shapes_of(gguf: Path) -> tuple[Shapes, int]:
    reader = GGUFReader(gguf)
    return {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}, int(reader.data_offset)


@pytest.fixture(scope="module")
def wide_student(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512 columns, which K-quants divide; nine layers, so that the rules for the first and last
    eighth apply; a small vocabulary, so that the layers decide the size."""
    folder = tmp_path_factory.mktemp("wide")
    import_student("random:9x256", "wide", folder / "whole", strings=1)
    trim_vocabulary(folder / "whole", pairs, pairs[:1], folder / "trimmed")
    return folder / "trimmed"


@pytest.fixture(scope="module", params=["wide_student", "student"])
def f16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's rows of 64 and 128 columns get the fallbacks of the K-quants."""
    path = tmp_path_factory.mktemp("f16") / "f16.gguf"
    write_gguf(request.getfixturevalue(request.param), path)
    return path


@pytest.fixture(scope="module")
def untied(untied_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untied") / "f16.gguf"
    write_gguf(untied_student, path)
    return path


def assert_predicted(source: Path, type: str, folder: Path) -> None:
    shapes, header = shapes_of(source)
    report = quantize_gguf(source, folder / "q.gguf", type)
    actual = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / "q.gguf").tensors}
    assert tensor_types(shapes, type) == actual
    assert predict_bytes(shapes, type, header) == pytest.approx(report.bytes, rel=1e-3)


@pytest.mark.parametrize("type", GENERAL_FILE_TYPES)
def test_types_and_bytes_are_as_llama_cpp_chooses(f16: Path, type: str, tmp_path: Path) -> None:
    assert_predicted(f16, type, tmp_path)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M"])
def test_an_output_matrix_of_its_own_is_predicted(untied: Path, type: str, tmp_path: Path) -> None:
    assert_predicted(untied, type, tmp_path)
