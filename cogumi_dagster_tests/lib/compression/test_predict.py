from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from cogumi_dagster.lib.compression.gguf_export import GENERAL_FILE_TYPES, quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.predict import predict_bytes, tensor_types
from cogumi_dagster.lib.llama_log import quiet_llama
from cogumi_dagster.lib.planning.shapes import read_folder
from cogumi_dagster.lib.planning.sizes import checkpoint_bytes
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


SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 17, "num_attention_heads": 8}),
    ("llama", {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 1,
               "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    ("qwen2", {"hidden_size": 128, "intermediate_size": 608, "num_attention_heads": 16, "num_key_value_heads": 2}),
    ("qwen2", {"hidden_size": 256, "intermediate_size": 304, "num_hidden_layers": 3, "tie_word_embeddings": False}),
    ("qwen3", {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 5, "num_attention_heads": 8}),
]  # fmt: skip
"""Grouped and plain, tied and not, with biases, query norms and rope factors; rows of 304 fit no block."""


@pytest.mark.parametrize("type", ["Q8_0", "Q5_K_M", "Q3_K_M", "Q2_K", "IQ4_NL"])
@pytest.mark.parametrize(("architecture", "changes"), SHAPES)
def test_every_architecture_is_predicted_from_its_config(
    tiny_model: Callable[..., Path], architecture: str, changes: dict[str, Any], type: str, tmp_path: Path
) -> None:
    folder = tiny_model(architecture, **changes)
    shape = read_folder(folder)
    assert checkpoint_bytes(shape) == pytest.approx((folder / "model.safetensors").stat().st_size, abs=16)
    write_gguf(folder, tmp_path / "f16.gguf")
    shapes, _ = shapes_of(tmp_path / "f16.gguf")
    assert shape.gguf_tensors == shapes
    assert_predicted(tmp_path / "f16.gguf", type, tmp_path)


def test_a_70b_stores_its_shared_value_matrices_in_more_bits() -> None:
    big = {f"blk.{layer}.attn_{part}.weight": (rows, 8192) for layer in range(80)
           for part, rows in (("q", 8192), ("k", 1024), ("v", 1024))}  # fmt: skip
    kinds = tensor_types(big, "Q4_K_M")
    assert kinds["blk.40.attn_v.weight"] == "Q5_K" and kinds["blk.40.attn_q.weight"] == "Q4_K"


@pytest.mark.parametrize("type", ["Q4_0", "Q5_0", "IQ4_NL", "Q4_K_M"])
def test_an_importance_matrix_changes_the_first_layers(
    tiny_model: Callable[..., Path], type: str, tmp_path: Path
) -> None:
    write_gguf(tiny_model("llama", num_hidden_layers=17), tmp_path / "f16.gguf")
    shapes, _ = shapes_of(tmp_path / "f16.gguf")
    quantize_with_ones(tmp_path / "f16.gguf", tmp_path / "q.gguf", GENERAL_FILE_TYPES[type], shapes)
    actual = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q.gguf").tensors}
    assert tensor_types(shapes, type, imatrix=True) == actual


def quantize_with_ones(source: Path, out: Path, file_type: int, shapes: Shapes) -> None:
    """llama.cpp's own mix with an importance matrix that holds every column as important as any other."""
    import ctypes

    import llama_cpp
    import numpy as np

    ones = {name: np.ones(shape[-1], np.float32) for name, shape in shapes.items() if len(shape) == 2}
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in ones.items()]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    with quiet_llama():
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    assert status == 0
