"""What a run would make and why; running it; settling what a crash left."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from cogumi_dagster.definitions import defs
from cogumi_dagster.defs import partitions, pipeline
from cogumi_dagster.defs.artifact import (
    ASKS_KEY,
    CODE_KEY,
    CONFIG_KEY,
    REPORTS_KEY,
    TASKS_KEY,
    config_of,
    named_teacher_versions,
    report_versions,
    task_versions,
    teacher_versions,
    unjudged,
)
from cogumi_dagster.defs.pipeline import PROCESS_TAG, Node, plan, process_mark, reconcile, run_nodes
from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS, MODIFIERS, STRATEGIES
from resources import build_resources
from resources.settings import ProfileResource

GRAPH = defs.resolve_asset_graph()
CHAIN = ("source_examples", "teacher_responses", "quality_scores", "curated_examples")
TAUGHT = CHAIN[:3]
INDEPENDENT = ("student_model", "escalation_detector")
LEFT_OUT = set(STRATEGIES) - {"scheduling"}
"""Strategies that no profile of these tests asks for."""
Slot = tuple[str, str | None]


def keys(asset: str) -> list[str | None]:
    definition = GRAPH.get(dg.AssetKey(asset)).partitions_def
    return [key for key in definition.get_partition_keys() if key not in LEFT_OUT] if definition else [None]


def parents(asset: str, partition: str | None) -> set[Slot]:
    """Dagster's own account of a node's inputs."""
    mapped = GRAPH.get_parents_partitions(dg.AssetKey(asset), partition).parent_partitions
    slots = {(p.asset_key.to_user_string(), p.partition_key) for p in mapped if p.asset_key.path != ["teacher_data"]}
    return {slot for slot in slots if slot[1] not in LEFT_OUT or partition is not None}


def label(slot: Slot) -> str:
    return f"{slot[0]}[{slot[1]}]" if slot[1] else slot[0]


class Store:
    """A profile's store, and fake artifacts in it."""

    def __init__(self, profile: Path) -> None:
        resources = build_resources(str(profile))
        self.settings: ProfileResource = resources["settings"]
        self.store: ArtifactStore = resources["store"].open()

    def plan(self, *select: str, partition: str | None = None) -> list[Node]:
        return plan(self.settings, self.store, select, partition)

    def due(self, *select: str, partition: str | None = None) -> set[Slot]:
        return {(n.asset, n.partition) for n in self.plan(*select, partition=partition) if n.reason}

    def make(self, asset: str, partition: str | None, text: str = "made", **report: float) -> None:
        """An artifact with the record that ``@artifact`` would write."""
        metadata = GRAPH.get(dg.AssetKey(asset)).metadata
        inputs = {label(slot): self.store.get(*slot).version for slot in parents(asset, partition)}
        if asset in TAUGHT:
            inputs |= teacher_versions(self.settings, [str(partition)])
        inputs |= named_teacher_versions(self.settings, metadata[ASKS_KEY].value)
        inputs |= task_versions(str(metadata[TASKS_KEY]), partition)
        inputs |= unjudged(metadata[TASKS_KEY], partition, [str(partition)] if asset in TAUGHT else [])
        if metadata[REPORTS_KEY]:
            inputs |= report_versions(
                {label(slot): self.store.get(*slot).manifest for slot in parents(asset, partition)}
            )
        config = config_of(self.settings.profile, metadata[CONFIG_KEY].value, partition)
        code = str(metadata[CODE_KEY])
        with self.store.write(asset, partition, code_version=code, config=config, inputs=inputs) as draft:
            (draft.path / "rows.jsonl").write_text(f"{asset} {partition} {text}")
            draft.metrics = {"report": report}

    def make_all(self) -> None:
        for node in self.plan():
            self.make(node.asset, node.partition)


@pytest.fixture
def empty(profile: Path) -> Store:
    return Store(profile)


@pytest.fixture
def full(profile: Path) -> Store:
    made = Store(profile)
    made.make_all()
    return made


ALL = {(key.to_user_string(), p) for key in GRAPH.materializable_asset_keys for p in keys(key.to_user_string())}


def downstream(*start: Slot) -> set[Slot]:
    """These and all that is made from them."""
    found = set(start)
    while more := {slot for slot in ALL - found if parents(*slot) & found}:
        found |= more
    return found


def chain(domain: str) -> set[Slot]:
    return {(asset, domain) for asset in CHAIN}


def test_an_empty_store_lacks_everything(empty: Store) -> None:
    nodes = empty.plan()
    assert {(node.asset, node.partition) for node in nodes} == ALL
    assert {node.reason for node in nodes} == {"not made yet"}
    assert len(nodes) == len(ALL)


def test_the_order_is_one_of_making(empty: Store) -> None:
    seen: set[Slot] = set()
    for node in empty.plan():
        assert parents(node.asset, node.partition) <= seen, node.label
        seen.add((node.asset, node.partition))


def test_the_plan_knows_the_inputs_that_dagster_knows(empty: Store) -> None:
    specs = pipeline._specs()
    counted = pipeline._keys(specs, empty.settings)
    for asset, partition in ALL:
        assert set(pipeline._parents(specs, counted, asset, partition)) == parents(asset, partition)


def test_a_strategy_that_the_profile_leaves_out_is_made_when_asked_for(full: Store) -> None:
    assert full.due() == set()
    asked = full.due(partition="circuit_logic")
    assert asked == {(name, "circuit_logic") for name, key in ALL if key == "scheduling"} and len(asked) == 4
    for node in full.plan(partition="circuit_logic"):
        if node.reason:
            full.make(node.asset, node.partition)
    assert full.due(partition="circuit_logic") == set()
    assert full.due() == {("model_card", None)}, "its report is to be in the card"


def test_a_full_store_lacks_nothing(full: Store) -> None:
    assert full.due() == set()
    assert all(node.seconds > 0 for node in full.plan())


def test_a_change_of_one_domain_reaches_its_chain_and_all_that_is_downstream(full: Store) -> None:
    path = full.settings.sources / "math.yaml"
    path.write_text(path.read_text() + "# one more line\n")
    others = {slot for domain in DOMAINS if domain != "math" for slot in chain(domain)}
    assert full.due() == ALL - others - {(asset, None) for asset in INDEPENDENT}
    reasons = {node.label: node.reason for node in full.plan()}
    assert reasons["source_examples[math]"] == "teacher_data[math] has changed"
    assert reasons["curated_examples[math]"] == "after quality_scores"
    assert reasons["serving_bundle"] == "after gguf_model and 9 more"


def test_another_prompt_of_a_teacher_reaches_what_asks_it(profile: Path, edit_profile: Callable[..., None]) -> None:
    edit_profile(modifiers__cascade=["groq-llama-70b", "solver"])
    full = Store(profile)
    full.make_all()
    catalogue = full.settings.catalogue
    teachers = yaml.safe_load(catalogue.read_text())
    teachers["groq-llama-70b"]["system_prompt"] = "Answer with care."
    catalogue.write_text(yaml.safe_dump(teachers))
    reasons = {(n.asset, n.partition): n.reason for n in full.plan() if n.reason}
    assert {slot for slot, reason in reasons.items() if reason == "teacher[groq-llama-70b] has changed"} == {
        ("cascade_examples", name) for name in MODIFIERS
    }
    assert set(reasons) == downstream(*(("cascade_examples", name) for name in MODIFIERS))


def test_another_price_reaches_the_table_of_costs(full: Store) -> None:
    catalogue = full.settings.catalogue
    teachers = yaml.safe_load(catalogue.read_text())
    teachers["groq-llama-70b"]["usd_per_million_output"] = 123.0
    catalogue.write_text(yaml.safe_dump(teachers))
    reasons = {n.asset: n.reason for n in full.plan() if n.reason}
    assert reasons.pop("strategy_evaluation") == "teacher[prices] has changed"
    assert set(reasons) == {"model_card"}
    for slot in (("strategy_evaluation", key) for key in keys("strategy_evaluation")):
        full.make(*slot, usd=2.0)  # the same answers, at another price
    assert full.due() == {("model_card", None)}
    full.make("model_card", None)
    assert not full.due()


def test_a_change_of_config_reaches_what_names_it(full: Store, edit_profile: Callable[..., None]) -> None:
    edit_profile(compression__zstd_level=3)
    reasons = {(n.asset, n.partition): n.reason for n in full.plan() if n.reason}
    changed = {slot for slot, reason in reasons.items() if reason == "its configuration has changed"}
    assert changed == {("packaged_base", None), ("compression_frontier", None),
                       *(("packaged_modifier", name) for name in MODIFIERS)}  # fmt: skip
    assert set(reasons) == downstream(*changed)


def test_a_change_for_one_partition_reaches_no_other(full: Store, edit_profile: Callable[..., None]) -> None:
    edit_profile(modifiers__rank={"code": 4, "reasoning": 4, "automation": 8})
    edit_profile(modifiers__siblings={"reasoning": 1, "code": 2})
    reasons = {(n.asset, n.partition): n.reason for n in full.plan() if n.reason}
    changed = {slot for slot, reason in reasons.items() if reason == "its configuration has changed"}
    assert changed == {("modifier_adapter", "automation"), ("cascade_examples", "code")}


def test_a_change_of_code_says_so(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = pipeline._specs()
    newer = specs["gguf_model"].replace_attributes(metadata={**specs["gguf_model"].metadata, CODE_KEY: "99"})
    monkeypatch.setattr(pipeline, "_specs", lambda: {**specs, "gguf_model": newer})
    reasons = {node.label: node.reason for node in full.plan() if node.reason}
    assert reasons["gguf_model"] == "its code has changed"
    assert "awq_checkpoint" not in reasons


def test_what_was_made_without_a_sandbox_is_due_with_one_and_not_the_other_way_round(
    full: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sandbox(usable: bool) -> None:
        monkeypatch.setattr("cogumi_dagster.lib.tasks.sandbox_available", lambda: (usable, ""))

    sandbox(True)
    full.make_all()
    sandbox(False)
    assert full.due() == set(), "what was judged stays"
    for remade, reason in (
        (("domain_failures", "automation"), None),
        (("domain_failures", "code"), "sandbox has changed"),
        (("teacher_responses", "code"), "sandbox has changed"),
    ):
        sandbox(False)
        full.make(*remade)
        sandbox(True)
        reasons = {(node.asset, node.partition): node.reason for node in full.plan() if node.reason}
        assert reasons.get(remade) == reason


def test_an_input_made_by_itself_is_a_change(full: Store) -> None:
    full.make("student_model", None, "other weights")
    reasons = {node.label: node.reason for node in full.plan() if node.reason}
    assert reasons["curated_examples[code]"] == "student_model has changed"
    assert "student_model" not in reasons


def test_what_failed_a_blocking_check_is_due_until_it_passes(full: Store) -> None:
    ref = full.store.get("gguf_model")
    failed = {"check": "export_equals_parent", "passed": False, "blocking": True}
    full.store.annotate(ref, checks=[{"check": "other", "passed": False, "blocking": False}])
    assert full.due() == set()
    full.store.annotate(ref, checks=[failed])
    reasons = {node.label: node.reason for node in full.plan() if node.reason}
    assert reasons["gguf_model"] == "its check export_equals_parent failed"
    assert reasons["packaged_base"] == "after gguf_model"
    full.store.annotate(ref, checks=[{**failed, "passed": True}])
    assert full.due() == set()


def test_lost_files_are_due(full: Store) -> None:
    (full.store.get("router_model").path / "rows.jsonl").unlink()
    assert {node.label: node.reason for node in full.plan() if node.reason}["router_model"] == "not made yet"


# select and partition


@pytest.mark.parametrize("field", ["strategy__teacher", "modifiers__cascade", "teaching__mix"])
def test_a_teacher_that_the_catalogue_does_not_have_is_an_error_before_anything_runs(
    empty: Store, edit_profile: Callable[..., None], field: str
) -> None:
    wrong = {"strategy__teacher": "solverr", "modifiers__cascade": ["solverr"]}
    mix = {**empty.settings.profile.model_dump()["teaching"]["mix"], "math": [{"teacher": "solverr", "share": 1.0}]}
    edit_profile(**{field: wrong.get(field, mix)})
    with pytest.raises(CogumiError, match="no teacher 'solverr'") as caught:
        empty.plan()
    assert "'solver'" in caught.value.mend


def test_select_means_these_assets_in_all_their_partitions(empty: Store) -> None:
    assert empty.due("source_examples", "student_model") == {
        *(("source_examples", domain) for domain in DOMAINS), ("student_model", None),
    }  # fmt: skip


def test_a_plus_means_all_upstream_or_downstream(empty: Store) -> None:
    assert {asset for asset, _ in empty.due("+base_adapter")} == {
        "source_examples", "teacher_responses", "quality_scores", "curated_examples", "distillation_dataset",
        "student_model", "trimmed_student", "base_adapter",
    }  # fmt: skip
    assert {asset for asset, _ in empty.due("strategy_adapter+")} == {
        "strategy_adapter",
        "strategy_evaluation",
        "model_card",
    }
    code = empty.due("+modifier_evaluation", partition="code")
    assert {("modifier_evaluation", "code"), ("gguf_model", None), ("curated_examples", "math")} <= code
    assert ("modifier_adapter", "reasoning") not in code
    with pytest.raises(CogumiError, match="no partition 'math'"):
        empty.due("+modifier_evaluation", partition="math")
    assert {slot for slot in empty.due("strategy_journal+", partition="scheduling")} == {
        (asset, "scheduling")
        for asset in ("strategy_journal", "learned_strategy", "strategy_adapter", "strategy_evaluation")
    }
    assert ("gguf_model", None) in empty.due("student_model+") and ("quality_scores", "math") not in empty.due(
        "student_model+"
    )


def test_inputs_that_are_out_of_date_and_not_asked_for_are_named(full: Store) -> None:
    full.make("awq_checkpoint", None, "other bytes")
    full.make("domain_failures", "code", "so that it is to be made, for a reason of its own")
    (full.store.root / "domain_failures" / "code" / "CURRENT.json").unlink()
    nodes = full.plan("domain_failures", partition="code")
    assert [node.label for node in nodes if node.reason] == ["domain_failures[code]"]
    assert {node.label: node.stale for node in nodes if node.stale} == {
        "gguf_model": "awq_checkpoint has changed",
    }
    assert not any(node.stale for node in full.plan())
    assert not any(node.stale for node in full.plan("student_model"))


def test_any_family_that_the_profile_names_is_a_partition(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.write_text("strategy: {families: [gcd]}")
    monkeypatch.setenv("COGUMI_PROFILE", str(profile))
    assert partitions._strategies() == [*STRATEGIES, "gcd"]
    profile.write_text("strategy: {families: [gdc]}")
    assert partitions._strategies() == list(STRATEGIES), "what is wrong is said where the profile is used"


def test_inputs_that_were_never_made_are_not_called_out_of_date(empty: Store) -> None:
    assert not any(node.stale for node in empty.plan("curated_examples"))


def test_select_and_partition_mean_that_partition_of_these_assets(empty: Store) -> None:
    assert empty.due("source_examples", "curated_examples", partition="math") == {
        ("source_examples", "math"), ("curated_examples", "math"),
    }  # fmt: skip
    assert empty.due("source_examples", "student_model", partition="math") == {
        ("source_examples", "math"), ("student_model", None),
    }  # fmt: skip


def test_partition_alone_means_every_asset_that_has_it(empty: Store) -> None:
    assert empty.due(partition="math") == chain("math")
    assert empty.due(partition="automation") == {slot for slot in ALL if slot[1] == "automation"}
    assert empty.due(partition="code") == {slot for slot in ALL if slot[1] == "code"}  # a domain and a modifier


def test_the_plan_lists_what_was_not_asked_for_without_a_reason(empty: Store) -> None:
    nodes = empty.plan("source_examples", partition="math")
    assert {(node.asset, node.partition) for node in nodes} == ALL
    assert [node.label for node in nodes if node.reason] == ["source_examples[math]"]


def test_what_is_up_to_date_is_not_made_because_it_was_asked_for(full: Store) -> None:
    assert full.due("gguf_model") == set()


@pytest.mark.parametrize(
    ("select", "partition", "problem", "mend"),
    [
        (["gguf_modell"], None, "there is no asset 'gguf_modell'", "did you mean 'gguf_model'?"),
        (["source_examples"], "maths", "there is no partition 'maths' of source_examples", "did you mean 'math'?"),
        (
            [],
            "strategyy",
            "there is no partition 'strategyy' of any asset",
            "known: all, automation, chain_sum, circuit_logic, code, ",
        ),
        (["student_model"], "math", "there is no partition 'math' of student_model", "known: none"),
        (["teacher_data"], None, "there is no asset 'teacher_data'", "did you mean 'teacher_"),
    ],
)
def test_unknown_names_bring_the_nearest(
    empty: Store, select: list[str], partition: str | None, problem: str, mend: str
) -> None:
    with pytest.raises(CogumiError) as caught:
        empty.plan(*select, partition=partition)
    assert caught.value.problem == problem
    assert caught.value.mend.startswith(mend)


# running


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as made:
        yield made


def code_location(profile: Path) -> dg.Definitions:
    from cogumi_dagster.defs.graph import ASSETS

    return dg.Definitions(assets=ASSETS, resources=build_resources(str(profile)))


def test_a_failure_is_named_and_what_depends_on_it_skipped(
    profile: Path, empty: Store, instance: dg.DagsterInstance
) -> None:
    source = empty.settings.sources / "math.yaml"
    nodes = [node for node in empty.plan() if node.asset in (*CHAIN[:2], "distillation_dataset")]
    nodes = [node for node in nodes if node.partition in ("math", "code", None)]
    source.write_text("families: [no_such_family]\n")
    results = {result.node.label: result for result in run_nodes(code_location(profile), instance, nodes)}
    assert results["source_examples[math]"].verdict == "failed"
    assert "no_such_family" in results["source_examples[math]"].error
    assert results["teacher_responses[math]"].verdict == "skipped"
    assert results["source_examples[code]"].verdict == "made"
    assert results["teacher_responses[code]"].verdict == "made"
    assert empty.store.current("teacher_responses", "code") is not None


def test_what_is_made_is_known_to_be_unchanged_when_it_is_made_again(
    profile: Path, empty: Store, instance: dg.DagsterInstance
) -> None:
    nodes = [node for node in empty.plan("source_examples", partition="math") if node.reason]
    watched: list[str] = []
    (made,) = run_nodes(code_location(profile), instance, nodes, watch=lambda n, at, of: watched.append(f"{at}/{of}"))
    (again,) = run_nodes(code_location(profile), instance, nodes)
    assert (made.verdict, again.verdict) == ("made", "unchanged")
    assert watched == ["1/1"]
    assert empty.due("source_examples", partition="math") == set()
    (first, *_) = instance.get_runs()
    assert first.tags[PROCESS_TAG] == process_mark(os.getpid())
    assert first.tags["dagster/partition"] == "math"


# after a crash


def dead_mark() -> str:
    """The mark of a process that was."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = process_mark(process.pid)
    process.kill()
    process.wait()
    assert mark and process_mark(process.pid) is None
    assert process.stdin
    process.stdin.close()
    return mark


def started_run(instance: dg.DagsterInstance, mark: str | None) -> str:
    tags = {} if mark is None else {PROCESS_TAG: mark}
    run = dg.DagsterRun(job_name="__ASSET_JOB", tags=tags, status=dg.DagsterRunStatus.STARTED)
    instance.add_run(run)
    return run.run_id


def status(instance: dg.DagsterInstance, run_id: str) -> str:
    run = instance.get_run_by_id(run_id)
    assert run
    return run.status.value


def test_a_run_of_a_dead_process_is_failed_and_its_slot_freed(instance: dg.DagsterInstance) -> None:
    instance.event_log_storage.set_concurrency_slots("gpu", 1)
    dead, alive = started_run(instance, dead_mark()), started_run(instance, process_mark(os.getpid()))
    claim = instance.event_log_storage.claim_concurrency_slot("gpu", dead, "step")
    assert claim.is_claimed
    assert reconcile(instance) == [dead]
    assert (status(instance, dead), status(instance, alive)) == ("FAILURE", "STARTED")
    assert instance.event_log_storage.claim_concurrency_slot("gpu", alive, "step").is_claimed
    assert reconcile(instance) == [], "once is enough"


def test_a_process_id_that_was_given_again_is_another_process(instance: dg.DagsterInstance) -> None:
    run = started_run(instance, f"{os.getpid()}-1")  # ours, but started with the machine
    assert reconcile(instance) == [run]


def test_a_run_of_the_daemon_is_the_daemons_while_it_lives(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started_run(instance, None)
    beats = [time.time()]
    monkeypatch.setattr(type(instance), "get_daemon_heartbeats", lambda self: {"SENSOR": _Beat(beats[0])})
    assert reconcile(instance) == []
    beats[0] -= 120
    assert reconcile(instance) == [run]


class _Beat:
    def __init__(self, timestamp: float) -> None:
        self.timestamp = timestamp


def test_a_finished_run_is_left_alone(instance: dg.DagsterInstance) -> None:
    run = dg.DagsterRun(job_name="__ASSET_JOB", tags={PROCESS_TAG: dead_mark()}, status=dg.DagsterRunStatus.SUCCESS)
    instance.add_run(run)
    assert reconcile(instance) == []
