from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from cogumi_dagster.lib.compression.ggml import block_of, dequantize_rows, fits, quantize_rows, row_bytes
from cogumi_dagster.lib.compression.gguf_export import quantize_gguf
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import Imatrix
from cogumi_dagster.lib.compression.quantize import KINDS, quantize_file
from cogumi_dagster.lib.errors import CogumiError

STOCK = ("Q8_0", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_NL", "Q2_K")


def same_bytes(source: Path, quantized: Path, imatrix: Imatrix | None = None) -> int:
    """How many tensors of ``quantized`` ``quantize_rows`` makes byte for byte; fails at the first that it does not."""
    stored = {tensor.name: tensor for tensor in GGUFReader(quantized).tensors}
    compared = 0
    for name, _, values in open_gguf(source).tensors():
        if values.ndim == 2:
            importance = imatrix.importance(name) if imatrix else None
            ours = quantize_rows(values, stored[name].tensor_type.name, importance)
            assert ours.tobytes() == stored[name].data.tobytes(), name
            compared += 1
    return compared


@pytest.mark.parametrize("type", STOCK)
def test_the_bytes_are_those_of_llama_cpp(f16_gguf: Path, wide_gguf: Path, type: str, tmp_path: Path) -> None:
    for source in (f16_gguf, wide_gguf):
        quantize_gguf(source, tmp_path / "q.gguf", type)
        assert same_bytes(source, tmp_path / "q.gguf") > 7


@pytest.mark.parametrize("type", ["Q4_K_M", "Q4_0"])
def test_the_bytes_are_those_of_llama_cpp_with_an_importance_matrix(
    wide_gguf: Path, wide_imatrix: Imatrix, type: str, tmp_path: Path
) -> None:
    quantize_file(wide_gguf, tmp_path / "q.gguf", type, imatrix=wide_imatrix)
    assert same_bytes(wide_gguf, tmp_path / "q.gguf", wide_imatrix) > 7
    with pytest.raises(AssertionError):
        same_bytes(wide_gguf, tmp_path / "q.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_as_gguf_reads_them(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(70, 512)).astype(np.float32)
    data = quantize_rows(values, kind)
    assert data.shape == (70, row_bytes(kind, 512)) == (70, 512 // block_of(kind)[0] * block_of(kind)[1])
    back = dequantize_rows(data, kind, 512)
    np.testing.assert_allclose(back, dequantize(data, GGMLQuantizationType[kind]), rtol=1e-6)
    bits = 8 * row_bytes(kind, 512) / 512
    assert np.square(back - values).mean() < 4 * 2 ** (-2 * (bits - 0.5)), "a bit more is a quarter of the error"


def test_columns_that_weigh_more_are_kept_better() -> None:
    values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    weights = np.where(np.arange(256) % 4 == 0, 100.0, 1.0).astype(np.float32)
    plain, weighed = (dequantize_rows(quantize_rows(values, "Q4_0", w), "Q4_0", 256) - values for w in (None, weights))
    assert np.square(weighed[:, ::4]).mean() < 0.8 * np.square(plain[:, ::4]).mean()


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    assert fits("Q4_0", 576) and not fits("Q4_K", 576)
    with pytest.raises(CogumiError, match="576 columns cannot be stored as Q4_K, whose blocks hold 256"):
        quantize_rows(np.zeros((2, 576), np.float32), "Q4_K")


def test_an_importance_of_another_length_is_refused() -> None:
    with pytest.raises(CogumiError, match=r"shape \(32,\) for rows of 64 columns"):
        quantize_rows(np.zeros((2, 64), np.float32), "Q4_0", np.ones(32, np.float32))
