"""The graph as a literal list: what is added, renamed or lost shows here."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from cogumi_dagster.definitions import defs
from cogumi_dagster.defs.artifact import OWNERS
from cogumi_dagster.defs.graph import GROUPS
from cogumi_dagster.lib.report.card import STEPS

ROOT = Path(__file__).resolve().parent.parent

GRAPH = {
    "dataset": """teacher_data source_examples teacher_responses quality_scores curated_examples
        distillation_dataset""",
    "base": "student_model trimmed_student base_adapter base_checkpoint",
    "compression": """pruned_checkpoint recovered_checkpoint awq_checkpoint w4a16_checkpoint gguf_model packaged_base
        compression_frontier parity_chain""",
    "modifiers": """domain_failures failure_patterns cascade_examples modifier_adapter packaged_modifier
        modifier_evaluation""",
    "strategy": "strategy_journal learned_strategy strategy_adapter strategy_evaluation",
    "routing": "routing_examples confidence_calibration router_model escalation_detector",
    "deployment": "serving_bundle system_evaluation model_card",
}
CHECKS = {
    "source_examples": "drawn_as_asked no_broken_lines",
    "teacher_data": "teachers_available",
    "teacher_responses": "some_answers! answered verified nothing_in_doubt teachers_available cost_within_budget",
    "quality_scores": "mean_quality scores_spread",
    "curated_examples": "some_kept! kept_share",
    "distillation_dataset": """schema_valid! no_near_duplicates! not_contaminated! splits_disjoint!
        mix_within_tolerance mean_quality""",
    "student_model": "tokenizer_matches! tokenizer_round_trip",
    "trimmed_student": "ids_remapped! perplexity_kept",
    "base_adapter": "loss_fell validation_improved",
    "base_checkpoint": "merged_equals_adapter! greedy_agreement",
    "pruned_checkpoint": "sparsity_as_asked masks_kept! perplexity",
    "recovered_checkpoint": "mask_intact! perplexity_recovered",
    "awq_checkpoint": "logits_equal! scales_applied",
    "w4a16_checkpoint": "perplexity",
    "gguf_model": "export_equals_parent! perplexity_within_budget",
    "packaged_base": "bit_identical! within_budget",
    "compression_frontier": "bytes_predicted",
    "parity_chain": """same_ids! merged_equals_adapter! awq_equals_recovered! gguf_equals_awq! nothing_broken!
        unpacked_equals_quantized! served_equals_unpacked! recovered_within_budget quantized_within_budget
        score_kept""",
    "domain_failures": "all_judged",
    "failure_patterns": "silhouette sizes",
    "cascade_examples": "verified_share tier_1_share tiers_on_target",
    "modifier_adapter": "loss_fell",
    "packaged_modifier": "pruned_share packed_share bit_identical! parity within_budget",
    "modifier_evaluation": """repairs_failures keeps_successes all_judged repaired_share kept_share
        held_out_is_new benchmark_is_new""",
    "strategy_journal": "strategies_tried",
    "learned_strategy": "classes_balanced verified_share",
    "strategy_adapter": "loss_fell",
    "strategy_evaluation": """better_than_untrained balanced_accuracy beyond_chance gain_significant
        suites_reach_aims""",
    "routing_examples": "both_labels",
    "confidence_calibration": "calibration_error better_than_base_rate",
    "router_model": "auroc decides_fast recovers_gain",
    "escalation_detector": "accuracy recall_dissatisfied",
    "serving_bundle": "modifiers gates_passed",
    "system_evaluation": "no_regression gain served_as_evaluated benchmark",
    "model_card": "complete predicted_bytes_within",
}
"""Asset -> its checks; ``!`` marks one that blocks what is downstream."""
POOLS = {
    "gpu": """base_adapter pruned_checkpoint recovered_checkpoint awq_checkpoint w4a16_checkpoint compression_frontier
        domain_failures modifier_adapter modifier_evaluation strategy_journal strategy_adapter strategy_evaluation
        routing_examples system_evaluation""",
}
DOMAINS = ["code", "reasoning", "math", "science", "conversation", "creative"]
MODIFIERS = ["code", "reasoning", "automation"]
STRATEGIES = ["scheduling", "circuit_logic", "course_schedule", "chain_sum", "all"]
PARTITIONS = {
    **dict.fromkeys(GRAPH["dataset"].split()[:-1], DOMAINS),  # all but distillation_dataset
    **dict.fromkeys(GRAPH["modifiers"].split(), MODIFIERS),
    **dict.fromkeys(GRAPH["strategy"].split(), STRATEGIES),
}
JOBS = """base_job benchmark_job compression_job dataset_job deployment_job full_pipeline_job modifiers_job routing_job
    strategy_job teacher_data_changed_job"""
SENSORS = {"automation_sensor": "RUNNING", "teacher_data_sensor": "RUNNING"}
SCHEDULES = {
    "nightly_benchmark_schedule": ("0 3 * * *", "STOPPED"),
    "teacher_data_reconciliation_schedule": ("*/15 * * * *", "RUNNING"),
}
PREFIX_OF_STANDARD_JOBS = "__"

graph = defs.resolve_asset_graph()
repository = defs.get_repository_def()
nodes = {key.to_user_string(): graph.get(key) for key in graph.get_all_asset_keys()}


def test_assets_and_their_groups() -> None:
    assert {group: set(names.split()) for group, names in GRAPH.items()} == {
        group: {name for name, node in nodes.items() if node.group_name == group} for group in GROUPS
    }
    assert set(nodes) == {name for names in GRAPH.values() for name in names.split()}


def test_checks_and_which_of_them_block() -> None:
    found: dict[str, set[str]] = {}
    for key in graph.asset_check_keys:
        blocking = "!" if graph.get_check_spec(key).blocking else ""
        found.setdefault(key.asset_key.to_user_string(), set()).add(key.name + blocking)
    assert found == {asset: set(checks.split()) for asset, checks in CHECKS.items()}


def test_pools() -> None:
    found: dict[str, set[str]] = {}
    for name, node in nodes.items():
        for pool in node.pools or ():
            found.setdefault(pool, set()).add(name)
    assert found == {pool: set(names.split()) for pool, names in POOLS.items()}


def test_partitions() -> None:
    found = {
        name: list(node.partitions_def.get_partition_keys()) for name, node in nodes.items() if node.partitions_def
    }
    assert found == PARTITIONS


def test_jobs_sensors_and_schedules() -> None:
    jobs = {job.name for job in repository.get_all_jobs() if not job.name.startswith(PREFIX_OF_STANDARD_JOBS)}
    assert jobs == set(JOBS.split())
    assert {sensor.name: sensor.default_status.value for sensor in repository.sensor_defs} == SENSORS
    assert {
        schedule.name: (schedule.cron_schedule, schedule.default_status.value) for schedule in repository.schedule_defs
    } == SCHEDULES


@pytest.mark.parametrize("name", sorted(nodes))
def test_every_asset_says_what_it_is_and_whose(name: str) -> None:
    node = nodes[name]
    assert node.description
    assert node.kinds
    if name != "teacher_data":  # Dagster gives an observable source no owners and no code version
        assert node.owners == OWNERS
        assert node.code_version


@pytest.mark.parametrize("key", sorted(graph.asset_check_keys), ids=lambda key: key.to_user_string())
def test_every_check_says_what_it_claims(key: dg.AssetCheckKey) -> None:
    assert graph.get_check_spec(key).description


@pytest.mark.parametrize("job", JOBS.split())
def test_every_job_is_described(job: str) -> None:
    assert repository.get_job(job).description


def test_the_report_asks_for_steps_of_the_graph() -> None:
    assert set(STEPS) <= set(nodes)


PROBE = """
import sys, time
started = time.perf_counter()
from cogumi_dagster.definitions import defs
defs.get_repository_def()
print(f"{time.perf_counter() - started:.2f}")
print(",".join(sorted({"torch", "transformers", "sklearn", "datasets", "ray", "llmcompressor", "xllamacpp", "openai",
                       "groq", "together", "anthropic", "boto3"} & set(sys.modules))))
"""


def test_the_code_location_loads_light_and_without_an_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.split("\n")[:2]
    assert heavy == ""
    assert list(tmp_path.iterdir()) == [], "loading must write nothing"
    with capsys.disabled():
        print(f"\nthe code location loads in {seconds} s")
