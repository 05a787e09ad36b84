"""Teachers in the graph: asked for before anything is spent, one budget for a pipeline run, and no key anywhere."""

import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from cogumi_dagster.commands import teachers as commands
from cogumi_dagster.defs.artifact import PIPELINE_TAG
from cogumi_dagster.defs.dataset import checks
from cogumi_dagster.defs.dataset.assets import source_examples, teacher_data, teacher_responses
from cogumi_dagster.defs.graph import ASSETS
from cogumi_dagster.defs.pipeline import plan, run_nodes
from cogumi_dagster.lib.report.tables import check_table
from cogumi_dagster.lib.teaching import asking
from cogumi_dagster.lib.teaching.journal import JOURNAL_FILE
from resources import build_resources

sys.path.insert(0, str(Path(__file__).parents[1] / "lib" / "teaching"))
from wire_server import CANARY, WireServer, error_reply, user_prompt, wired

PROVIDERS = {"openai": "/v1", "groq": "", "together": "", "anthropic": ""}
KEY = "CANARY_KEY"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WireServer]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(KEY, CANARY)
    monkeypatch.setattr(asking, "sleep", lambda seconds: None)
    server = WireServer()
    server.default = lambda path, body: wired(path, user_prompt(body))
    yield server
    server.close()


@pytest.fixture
def paid(profile: Path, edit_profile: Callable[..., None], server: WireServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile with a teacher of each provider, all on the loopback server, for maths and science."""
    catalogue = profile.with_name("teachers.yaml")
    data = yaml.safe_load(catalogue.read_text())
    for provider, path in PROVIDERS.items():
        data[f"wire-{provider}"] = {
            "provider": provider, "model": "m", "tier": 2, "base_url": server.url + path, "api_key_env": KEY,
            "usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "requests_per_minute": 1_000_000,
        }  # fmt: skip
    catalogue.write_text(yaml.safe_dump(data))
    mix = [{"teacher": f"wire-{provider}", "share": 0.25} for provider in PROVIDERS]
    edit_profile(teaching__mix__math=mix, teaching__mix__science=mix, teaching__max_usd_per_run=1.0)
    monkeypatch.setenv("COGUMI_PROFILE", str(profile))
    return profile


def taught(paid: Path, instance: dg.DagsterInstance, domain: str = "math") -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [teacher_data, source_examples, teacher_responses],
        resources=build_resources(str(paid)),
        instance=instance,
        partition_key=domain,
        raise_on_error=False,
    )


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    return " ".join(
        str(event.step_failure_data.user_failure_data.description)
        for event in result.all_events
        if event.is_step_failure and event.step_failure_data.user_failure_data
    )


def availability(profile: Path) -> dg.AssetCheckResult:
    resources = build_resources(str(profile))
    found = checks.teachers_available(settings=resources["settings"], teachers=resources["teachers"])
    assert isinstance(found, dg.AssetCheckResult)
    return found


def test_offline_the_check_passes_without_a_network(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogumi_dagster.lib.teaching.available.connect", None)
    found = availability(profile)
    assert found.passed and set(found.metadata) == {"solver", "local"}


def test_a_withdrawn_model_is_named_with_its_replacement_and_nothing_is_spent(paid: Path, server: WireServer) -> None:
    assert availability(paid).passed
    server.models = ["m-2", "whisper"]
    found = availability(paid)
    assert not found.passed
    assert "teacher 'wire-groq' cannot be asked: groq does not list model 'm'" in str(found.description)
    assert "set its model to 'm-2'" in str(found.description)
    result = taught(paid, dg.DagsterInstance.ephemeral())
    assert "nothing was spent" in failure_of(result) and "'m-2'" in failure_of(result)
    assert server.posts() == []


def test_the_teachers_of_modifiers_and_strategies_are_looked_for_too(
    paid: Path, server: WireServer, edit_profile: Callable[..., None]
) -> None:
    offline = [{"teacher": "solver", "share": 1.0}]
    edit_profile(
        teaching__mix__math=offline, teaching__mix__science=offline, modifiers__cascade=["solver", "wire-groq"]
    )
    assert set(availability(paid).metadata) == {"solver", "local", "wire-groq"}
    server.models = ["m-2"]
    assert not availability(paid).passed


def test_the_check_runs_in_dagster_beside_the_asset(paid: Path) -> None:
    definitions = dg.Definitions(
        assets=[teacher_data], asset_checks=checks.CHECKS, resources=build_resources(str(paid))
    )
    job = definitions.resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.get_subset(
            asset_check_selection={dg.AssetCheckKey(dg.AssetKey("teacher_data"), "teachers_available")}
        ).execute_in_process(instance=instance)
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed and evaluation.asset_key == dg.AssetKey("teacher_data")


def test_child_runs_of_one_pipeline_run_share_its_budget(paid: Path) -> None:
    resources = build_resources(str(paid))
    definitions = dg.Definitions(assets=ASSETS, resources=resources)
    store = resources["store"].open()
    with dg.DagsterInstance.ephemeral() as instance:
        for domains in (("math", "science"), ("creative",)):
            nodes = plan(resources["settings"], store, ["source_examples", "teacher_responses"])
            chosen = [node for node in nodes if node.partition in domains and node.asset == "source_examples"]
            if domains[0] == "math":
                chosen = [node for node in nodes if node.partition in domains]
            assert all(result.verdict == "made" for result in run_nodes(definitions, instance, chosen))
        tags = [run.tags[PIPELINE_TAG] for run in instance.get_runs()]
    assert len(tags) == 3 and len(set(tags)) == 2
    with sqlite3.connect(store.root / JOURNAL_FILE) as db:
        runs = db.execute("SELECT run, COUNT(DISTINCT domain) FROM calls GROUP BY run").fetchall()
    db.close()
    assert runs == [(tags[-1], 2)]


def test_the_key_is_in_no_database_log_artifact_event_or_page(
    paid: Path, server: WireServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Errors and answers echo the key; then it is looked for in all that was written."""

    def echo(path: str, body: dict[str, Any]) -> Any:
        prompt = user_prompt(body)
        status = (400, 429, 500, 503)[len(prompt) % 4]
        if not server.asked[prompt]:
            return error_reply(status, f"your key {os.environ[KEY]} is bad", {"X-Key": os.environ[KEY]})
        return wired(path, prompt + os.environ[KEY])

    server.default = echo
    (tmp_path / "dagster").mkdir()
    log = logging.FileHandler(tmp_path / "all.log")
    root = logging.getLogger()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    try:
        # Not entered: execution enters it itself, and a second time leaves its storage behind for later tests.
        instance = dg.DagsterInstance.local_temp(str(tmp_path / "dagster"))
        assert taught(paid, instance).success
        server.listing = error_reply(401, f"Incorrect API key provided: {CANARY}")
        refused = taught(paid, instance, "science")
        assert not refused.success and "[redacted]" in failure_of(refused)
        assert not availability(paid).passed
        instance.dispose()
    finally:
        root.setLevel(level)
        root.removeHandler(log)
        log.close()
    commands.show_ledger("", False)
    print(check_table(build_resources(str(paid))["store"].open().artifacts()))
    said = capfd.readouterr()
    (tmp_path / "terminal").write_text(said.out + said.err)
    found = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert found == []
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert {".sqlite", ".db", ".jsonl", ".json", ".log"} <= written
    journal = build_resources(str(paid))["store"].open().root / JOURNAL_FILE
    assert b"your key [redacted] is bad" in journal.read_bytes()


def test_ledger_and_plan_say_what_was_and_what_will_be_spent(
    paid: Path, server: WireServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(show: Callable[..., None], *arguments: Any) -> Any:
        capsys.readouterr()
        show(*arguments, True)
        return json.loads(capsys.readouterr().out)

    before = said(commands.show_dataset_plan)
    assert taught(paid, dg.DagsterInstance.ephemeral()).success
    after = said(commands.show_dataset_plan)
    maths = [row for row in after["rows"] if row["domain"] == "math" and row["tasks"]]
    assert [row["calls"] for row in maths] == [0] * len(maths)
    assert before["calls"] - after["calls"] == sum(row["tasks"] for row in maths) == len(server.posts()) == 11
    assert after["usd"] < before["usd"]

    ledger = said(commands.show_ledger, "")
    assert sum(total["calls"] for total in ledger["totals"]["teacher"].values()) == 11
    assert set(ledger["totals"]["domain"]) == {"math"} and ledger["usd"] == pytest.approx(ledger["month_usd"])
    assert ledger["in_doubt"] == []
    with sqlite3.connect(build_resources(str(paid))["store"].open().root / JOURNAL_FILE) as db:
        db.execute("UPDATE calls SET state = 'doubt', text = NULL WHERE id = 1")
    db.close()
    (doubt,) = said(commands.show_ledger, "")["in_doubt"]
    assert doubt["id"] == 1 and doubt["worst_usd"] > 0
    commands.show_ledger("", False)
    shown = capsys.readouterr().out
    assert "#1" in shown and "--settle retry" in shown
    settled = said(commands.show_ledger, "retry")
    assert settled["in_doubt"] == [] and [row["id"] for row in settled["settled"]] == [1]


def test_the_dataset_job_runs_the_check() -> None:
    from cogumi_dagster.definitions import defs

    keys = defs.resolve_job_def("dataset_job").asset_layer.asset_graph.asset_check_keys
    assert "teacher_data:teachers_available" in {key.to_user_string() for key in keys}
