from pathlib import Path

import numpy as np
import pytest

from cogumi_dagster.lib.compression.gguf_export import write_gguf
from cogumi_dagster.lib.compression.gguf_model import (
    IMATRIX_FILE,
    MIXED,
    MODEL_FILE,
    decode_speed,
    export_model,
    measure_frontier,
    zeros_kept,
    zeros_of,
)  # fmt: skip
from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.compression.imatrix import read_imatrix
from cogumi_dagster.lib.evaluation.parity_chain import benchmark
from cogumi_dagster.lib.profile import CompressionConfig
from cogumi_dagster.lib.training.batches import Pair

CONFIG = CompressionConfig(gguf_type="Q8_0", frontier_types=("Q8_0", "Q4_K_M"), zstd_level=1, dictionary_kb=16)
TASKS = benchmark(2)


def test_the_served_file_is_exported_and_held_against_its_parent(
    student: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    report = export_model(student, pairs[:6], tmp_path / "out", CONFIG)
    assert report.f16_parity.mean_kl <= 1e-4
    assert report.f16_parity.mean_kl < report.parity.mean_kl < 1e-2
    assert report.perplexity_ratio == report.perplexity / report.perplexity_parent == pytest.approx(1, abs=0.05)
    change = report.perplexity_change
    assert change.low <= change.value <= change.high and change.value == pytest.approx(report.perplexity_ratio, 1e-5)
    assert change.count == 6, "answers"
    assert report.export.type == "Q8_0"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MODEL_FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    assert len(open_gguf(tmp_path / "out" / MODEL_FILE).metadata["cogumi.parent_sha256"]) == 64


def test_the_frontier_has_a_row_for_each_type(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = measure_frontier(
        student,
        pairs[:4],
        tmp_path / "out",
        CONFIG,
        tasks=TASKS,
        progress=lambda done, total, note: seen.append((done, total)),
    )
    eight, four = report.rows
    assert (eight.type, four.type) == ("Q8_0", "Q4_K_M")
    assert seen == [(1, 2), (2, 2)]
    assert report.worst_prediction_error < 1e-3
    assert eight.fallback_share == 0 and four.fallback_share > 0.9, "no row of 64 columns holds a K-quant"
    assert eight.fallbacks == "" and four.fallbacks == "Q4_K as Q5_0, Q6_K as Q8_0"
    assert four.bits_per_weight < eight.bits_per_weight and eight.mean_kl < four.mean_kl
    assert eight.score.count == four.score.count == 2
    assert all(row.perplexity_change.low <= row.perplexity_ratio <= row.perplexity_change.high for row in report.rows)
    assert all(row.tokens_per_second > 0 and 0 < row.zstd_ratio <= 1.01 for row in report.rows)


def test_zeros_that_a_type_has_no_value_for_are_lost(student: Path, tmp_path: Path) -> None:
    write_gguf(student, tmp_path / "f16.gguf")
    parent = zeros_of(tmp_path / "f16.gguf")
    name = "blk.0.ffn_up.weight"
    assert zeros_kept(tmp_path / "f16.gguf", parent) == 1.0
    pruned = {**parent, name: np.full_like(parent[name], 255)}  # as if all of it had been pruned
    assert zeros_kept(tmp_path / "f16.gguf", pruned) < 0.5
    assert zeros_kept(tmp_path / "f16.gguf", {key: np.zeros_like(bits) for key, bits in parent.items()}) == 1.0


def test_decoding_speed_is_a_figure(quantized_gguf: Path) -> None:
    assert decode_speed(quantized_gguf, streams=2, tokens=4) > 0


def test_a_budget_decides_the_mix_and_the_frontier_shows_it(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"budget_mb": 0.12, "frontier_types": ("Q4_0",)})
    report = export_model(student, pairs[:6], tmp_path / "served", config, calibration=pairs)
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [IMATRIX_FILE, MODEL_FILE]
    assert report.mix is not None and report.export.bytes <= report.mix.budget_bytes == 120_000
    assert report.imatrix_tokens == read_imatrix(tmp_path / "served" / IMATRIX_FILE).tokens > 256
    assert set(report.mix.types) == set(report.mix.scales) >= {"token_embd", "ffn_down"}
    frontier = measure_frontier(student, pairs[:4], tmp_path / "out", config, tasks=TASKS, served=tmp_path / "served")
    stock, mixed = frontier.rows
    assert (stock.type, mixed.type) == ("Q4_0", MIXED)
    assert mixed.bytes == report.export.bytes and mixed.fallback_share == 0.0 and mixed.fallbacks == ""
    assert stock.fallbacks == "Q6_K as Q8_0" and 0.1 < stock.fallback_share < 0.5, "the embedding"
    assert "Q4_0" in stock.stored_as and "%" in mixed.stored_as
    assert frontier.worst_prediction_error < 2e-2


def test_an_importance_matrix_is_kept_beside_the_model(student: Path, pairs: list[Pair], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"imatrix": True, "gguf_type": "Q4_0"})
    report = export_model(student, pairs[:6], tmp_path / "with", config, calibration=pairs)
    without = export_model(student, pairs[:6], tmp_path / "without", config.model_copy(update={"imatrix": False}))
    assert report.mix is None and report.imatrix_tokens > 256 and without.imatrix_tokens == 0
    assert report.export.sha256 != without.export.sha256
    assert (tmp_path / "with" / IMATRIX_FILE).is_file() and not (tmp_path / "without" / IMATRIX_FILE).exists()
