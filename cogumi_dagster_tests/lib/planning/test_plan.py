import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.planning.hardware import Device, accelerators, this_machine
from cogumi_dagster.lib.planning.losses import pretraining_loss
from cogumi_dagster.lib.planning.plan import judge_budget, parse_bytes, plan_model, propose, type_sizes
from cogumi_dagster.lib.planning.shapes import presets
from cogumi_dagster.lib.planning.sizes import TYPES
from cogumi_dagster.lib.profile import read_profile

SOURCES = Path(__file__).resolve().parents[3] / "resources" / "sources"
LAPTOP = Device("a laptop", 1e11, 16_000_000_000, 2e10, 4, 0.5, "made up")


@pytest.mark.parametrize(
    ("text", "count"),
    [("520MB", 520_000_000), (" 1.2 gb ", 1_200_000_000), ("500MiB", 500 * 2**20), ("8kB", 8000), ("7b", 7)],
)
def test_a_budget_is_a_number_and_a_unit(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["520 potatoes", "520", "", "MB", "-5MB", "0MB", "1,5GB", "520MBit", "nan MB", "5 ib"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CogumiError) as error:
        parse_bytes(text)
    assert f"the budget {text!r} is no size" in error.value.problem and "520MB" in error.value.mend


def test_an_8b_in_520_mb_is_impossible_and_the_reason_is_given() -> None:
    verdict = judge_budget(presets()["Llama-3.1-8B"], 520_000_000)
    assert verdict.fitting == () and verdict.bits_per_weight == pytest.approx(0.52, abs=0.005)
    assert "8.03B weights in 520 MB leave 0.52 bits for each" in verdict.reason
    assert "Q2_K, takes 3.18 GB" in verdict.reason and "IQ1_S" in verdict.reason
    near = judge_budget(presets()["Llama-3.1-8B"], 3_000_000_000)
    assert near.fitting == () and "IQ1_S" not in near.reason, "three bits are no matter of principle"


def test_what_fits_is_what_the_sizes_say() -> None:
    shape = presets()["Qwen2.5-1.5B"]
    sizes = {row.type: row.bytes for row in type_sizes(shape)}
    budget = sizes["Q5_0"]
    verdict = judge_budget(shape, budget)
    assert set(verdict.fitting) == {type for type, size in sizes.items() if size <= budget}
    assert verdict.reason == "" and verdict.smallest_bytes == min(sizes.values())
    assert set(sizes) == set(TYPES)


def test_proposals_fit_and_the_least_loss_is_first() -> None:
    found = propose(list(presets().values()), 520_000_000)
    assert found and all(proposal.bytes <= 520_000_000 for proposal in found)
    assert [p.loss for p in found] == sorted(p.loss for p in found)
    assert {p.student for p in found} == {"SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B", "Qwen3-0.6B"}
    assert propose(list(presets().values()), 1_000_000) == []
    more = propose(list(presets().values()), 6_000_000_000)
    assert more[0].student == "Llama-3.1-8B" and more[0].loss < found[0].loss


def test_the_rule_of_thumb_ranks_as_the_tables_do() -> None:
    """llama.cpp's own order of the mixes on Llama-3-8B, and larger students before smaller ones."""
    penalties = {row.type: row.penalty for row in type_sizes(presets()["Llama-3.1-8B"])}
    order = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
    assert [penalties[type] for type in order] == sorted(penalties[type] for type in order)
    assert penalties["F16"] == penalties["BF16"] == 0
    llamas = [pretraining_loss(presets()[name]) or 0.0 for name in ("Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.2-1B")]
    assert llamas == sorted(llamas) and llamas[0] > 1.8172
    assert pretraining_loss(replace(presets()["Llama-3.2-1B"], pretraining_tokens=None)) is None


def test_fallbacks_of_narrow_rows_show_in_what_is_stored() -> None:
    stored = {row.type: row.stored for row in type_sizes(presets()["SmolLM2-135M"])}
    assert stored["Q4_K_M"]["Q5_0"] > 0.5, "rows of 576 are no multiple of 256"
    assert all(sum(shares.values()) == pytest.approx(1) for shares in stored.values())


def test_decoding_is_bound_by_bandwidth_or_by_arithmetic() -> None:
    shape = presets()["SmolLM2-135M"]
    rows = {row.type: row for row in type_sizes(shape, [LAPTOP, replace(LAPTOP, name="slow sums", flops=1e9)])}
    read = rows["F16"].bytes - rows["Q4_0"].bytes
    assert rows["Q4_0"].decode["a laptop"] > rows["F16"].decode["a laptop"] and read > 0
    assert rows["F16"].decode["a laptop"] == pytest.approx(0.6 * 2e10 / (2 * shape.parameters), rel=0.01)
    assert rows["Q4_0"].decode["slow sums"] == pytest.approx(0.6 * 1e9 / (2 * shape.parameters))
    untied = {row.type: row for row in type_sizes(presets()["Llama-3.1-8B"], [LAPTOP])}["F16"]
    embeddings = 2 * 128256 * 4096
    assert untied.decode["a laptop"] == pytest.approx(0.6 * 2e10 / (untied.bytes - embeddings), rel=0.01)


def test_a_plan_holds_every_artifact_run_and_device_and_is_json() -> None:
    profile = read_profile("tiny")
    plan = plan_model(presets()["SmolLM2-135M"], profile, SOURCES, [LAPTOP, *accelerators()])
    assert {a.what.split(",")[0] for a in plan.artifacts} >= {
        "16-bit checkpoint", "QLoRA adapter", "NF4 weights", "W4A16", "modifier code", "modifier automation",
    }  # fmt: skip
    assert [run.what for run in plan.runs] == [
        "base adapter", "modifier code", "modifier reasoning", "modifier automation", "strategy",
    ]  # fmt: skip
    assert plan.runs[0].steps <= profile.training.max_steps
    assert [device.device for device in plan.devices] == ["a laptop", *(device.name for device in accelerators())]
    assert json.loads(json.dumps(asdict(plan)))["types"][0]["type"] == "F16"
    assert 0 < plan.examples <= profile.dataset.examples and 30 < plan.example_tokens < 400


def test_a_strategy_is_planned_for_the_epochs_of_its_traces() -> None:
    *_, short = plan_model(presets()["SmolLM2-135M"], read_profile("gpu"), SOURCES, []).runs
    config = read_profile("gpu").strategy
    assert 60 < short.tokens / config.traces / config.training.epochs < 200 and short.steps < config.training.max_steps
    *_, bound = plan_model(presets()["SmolLM2-135M"], read_profile("quick"), SOURCES, []).runs
    assert bound.steps == read_profile("quick").strategy.training.max_steps


def test_this_machine_is_measured() -> None:
    machine = this_machine(0.02)
    assert machine.flops > 1e8 and machine.bandwidth > 1e8 and machine.memory_bytes > 1e9
    assert machine.item_bytes in (2, 4) and "measured now" in machine.basis
