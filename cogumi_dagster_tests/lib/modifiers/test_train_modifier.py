import json
from collections import Counter
from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.gguf_read import open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import write_jsonl
from cogumi_dagster.lib.modifiers.package import ADAPTER_FILE, export_adapter, package_modifier
from cogumi_dagster.lib.modifiers.train import (
    balanced,
    modifier_pairs,
    split_lessons,
    task_pairs,
    train_on_served_weights,
)
from cogumi_dagster.lib.profile import LoraConfig
from cogumi_dagster.lib.serving.contract import refuse_other_base
from cogumi_dagster.lib.training.batches import Pair

ROW = {"task": {"prompt": "p", "family": "f"}, "response": "r", "cluster": 0}


def test_the_modifier_trains_on_the_dequantized_gguf(
    student: Path, quantized_gguf: Path, pairs: list[Pair], lora_config: LoraConfig, tmp_path: Path
) -> None:
    report = train_on_served_weights(
        quantized_gguf, student, pairs, tmp_path / "out", lora_config, scratch=tmp_path / "s", device="cpu", seed=0,
        section="modifiers.training",
    )  # fmt: skip
    assert report.validation_examples == 2 and report.examples == 22
    assert (tmp_path / "s" / "served" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_too_few_lessons_are_said_before_anything_is_loaded(tmp_path: Path, lora_config: LoraConfig) -> None:
    with pytest.raises(CogumiError, match="only 1 lessons to train on"):
        train_on_served_weights(
            tmp_path / "none", tmp_path, [Pair("p", "r")], tmp_path / "out", lora_config, scratch=tmp_path,
            device="cpu", seed=0, section="modifiers.training",
        )  # fmt: skip


def test_lessons_with_the_same_answer_are_on_one_side() -> None:
    pairs = [Pair(f"p{n}", f"r{n % 40}") for n in range(100)]
    train, validation = split_lessons(pairs, 3)
    assert sorted(train + validation, key=str) == sorted(pairs, key=str) and 5 <= len(validation) <= 10
    assert not {pair.response for pair in train} & {pair.response for pair in validation}
    assert [len(side) for side in split_lessons([Pair("a", "r"), Pair("b", "r"), Pair("c", "r")], 0)] == [2, 1]
    few = split_lessons([Pair("a", "r"), Pair("b", "r"), Pair("c", "s")], 0)
    assert [len(side) for side in few] == [2, 1]


def test_lessons_come_with_a_share_of_replay() -> None:
    lessons = [ROW] * 17
    successes = [{"task": {"prompt": f"s{n}", "family": "f"}, "response": "r"} for n in range(10)]
    mixed = modifier_pairs(lessons, successes, 0.15, seed=0)
    assert len(mixed) == 20 and sum(pair.group == "replay" for pair in mixed) == 3
    assert mixed == modifier_pairs(lessons, successes, 0.15, seed=0)
    assert len({pair.instruction for pair in mixed if pair.group == "replay"}) == 3
    assert len(modifier_pairs(lessons, successes[:1], 0.5, seed=0)) == 18
    assert len(modifier_pairs(lessons, successes, 0.0, seed=0)) == 17


def test_what_the_base_got_right_is_replayed_as_the_solver_works_it_out() -> None:
    lucky = {
        "task": {"prompt": "s", "family": "f", "solution": "1 + 1 = 2\nAnswer: 2"},
        "response": "3 - 2 = 2. Answer: 2",
    }
    unsolved = {"task": {"prompt": "t", "family": "f", "solution": None}, "response": "Dear friend"}
    mixed = modifier_pairs([ROW] * 2, [lucky, unsolved], 0.5, seed=0)
    assert {pair.response for pair in mixed if pair.group == "replay"} == {"1 + 1 = 2\nAnswer: 2", "Dear friend"}


def test_small_patterns_are_learned_more_often_and_replay_is_not() -> None:
    pairs = [Pair(f"{group} {n}", "r", group) for group, size in (("a", 10), ("b", 4), ("c", 1)) for n in range(size)]
    replay = [Pair("s", "r", "replay")]
    mixed = balanced(pairs + replay)
    counts = Counter(pair.group for pair in mixed)
    assert mixed[:16] == pairs + replay, "nothing is left out"
    assert counts == {"a": 10, "b": 5, "c": 3, "replay": 1}, "up to the mean, 5, and three times at most"
    assert balanced(replay) == replay and balanced([]) == []


def test_tasks_become_pairs_of_prompt_and_solution(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "solution": "s", "family": "f"}])
    assert task_pairs(tmp_path / "t.jsonl") == [Pair("p", "s", "f")]


def test_a_packaged_modifier_is_the_trained_one_with_its_contract(
    student: Path, f16_gguf: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    report = package_modifier(
        adapter, f16_gguf, student, pairs[:6], [], tmp_path / "out", families={"gcd": "1"}, level=3, dictionary_kb=4
    )
    assert report.parity.mean_kl <= 1e-4
    assert report.pruning.chosen == 0.0 and not report.pruning.tried
    assert report.adapter_bytes == (tmp_path / "out" / ADAPTER_FILE).stat().st_size == report.unpruned_bytes
    assert report.package.bit_identical
    assert json.loads((tmp_path / "out" / "contract.json").read_text()) == report.contract
    metadata = open_gguf(tmp_path / "out" / ADAPTER_FILE).metadata
    assert {key: metadata[f"cogumi.{key}"] for key in report.contract} == report.contract
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pruned_modifier_is_smaller_and_computes_what_transformers_computes_with_it(
    student: Path, f16_gguf: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    original = (adapter / "adapter_model.safetensors").read_bytes()
    report = package_modifier(
        adapter, f16_gguf, student, pairs[:6], pairs, tmp_path / "out", families={}, prune_shares=(0.5,),
        prune_keeps=-9.0, level=3, dictionary_kb=4,
    )  # fmt: skip
    assert report.pruning.adapter_loss < report.pruning.base_loss
    assert report.pruning.chosen == pytest.approx(0.5, abs=0.05)
    assert report.adapter_bytes < 0.7 * report.unpruned_bytes
    assert report.parity.mean_kl <= 1e-4
    assert (adapter / "adapter_model.safetensors").read_bytes() == original


def test_lessons_that_are_too_long_are_left_out_on_both_sides(
    student: Path, f16_gguf: Path, adapter: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    long = Pair("word " * 300, "x", "f")
    report = package_modifier(
        adapter, f16_gguf, student, [long, *pairs[:3]], [long, *pairs[:8]], tmp_path / "out", families={},
        max_length=200, level=3, dictionary_kb=4,
    )  # fmt: skip
    assert report.pruning.validation_examples == 8 and report.parity.mean_kl <= 1e-4


def test_an_exported_adapter_carries_the_contract_of_its_base(
    student: Path, f16_gguf: Path, quantized_gguf: Path, adapter: Path, tmp_path: Path
) -> None:
    contracts = []
    for gguf in (f16_gguf, quantized_gguf):
        assert export_adapter(adapter, gguf, student, tmp_path / "a.gguf") == (tmp_path / "a.gguf").stat().st_size
        contracts.append(open_gguf(tmp_path / "a.gguf").metadata["cogumi.base_sha256"])
    assert contracts[0] != contracts[1]
    refuse_other_base("strategy", tmp_path / "a.gguf", quantized_gguf)
    with pytest.raises(CogumiError, match="the adapter strategy was trained on another base"):
        refuse_other_base("strategy", tmp_path / "a.gguf", f16_gguf)
