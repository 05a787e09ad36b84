from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.gguf_model import MODEL_FILE, decode_speed, export_model, measure_frontier
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.profile import CompressionConfig
from cogumi_dagster.lib.training.batches import Pair

CONFIG = CompressionConfig(gguf_type="Q8_0", frontier_types=("Q8_0", "Q4_K_M"), zstd_level=1, dictionary_kb=16)


def test_the_served_file_is_exported_and_held_against_its_parent(
    student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    report = export_model(student, pairs[:6], tmp_path / "out", CONFIG)
    assert report.f16_parity.mean_kl <= 1e-4
    assert report.f16_parity.mean_kl < report.parity.mean_kl < 1e-2
    assert report.perplexity_ratio == report.perplexity / report.perplexity_parent == pytest.approx(1, abs=0.05)
    assert report.export.type == "Q8_0"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MODEL_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    assert len(open_gguf(tmp_path / "out" / MODEL_FILE).metadata["cogumi.parent_sha256"]) == 64


def test_the_frontier_has_a_row_for_each_type(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = measure_frontier(
        student, pairs[:4], tmp_path / "out", CONFIG, progress=lambda done, total, note: seen.append((done, total))
    )
    eight, four = report.rows
    assert (eight.type, four.type) == ("Q8_0", "Q4_K_M")
    assert seen == [(1, 2), (2, 2)]
    assert report.worst_prediction_error < 1e-3
    assert eight.fallback_share == 0 and four.fallback_share > 0.9, "no row of 64 columns holds a K-quant"
    assert four.bits_per_weight < eight.bits_per_weight
    assert all(row.tokens_per_second > 0 and 0 < row.zstd_ratio <= 1.01 for row in report.rows)


def test_decoding_speed_is_a_figure(quantized_gguf: Path) -> None:
    assert decode_speed(quantized_gguf, streams=2, tokens=4) > 0
