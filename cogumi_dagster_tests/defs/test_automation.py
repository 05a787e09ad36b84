"""What runs by itself when teacher data changes: the sensor, declarative automation, the reconciling schedule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cogumi_dagster.definitions import defs
from cogumi_dagster.defs.artifact import TEACHER_DATA
from cogumi_dagster.defs.automation import (
    DATA_VERSION,
    observe_teacher_data,
    teacher_data_reconciliation_schedule,
    teacher_data_sensor,
)
from cogumi_dagster.defs.partitions import partitions_made
from cogumi_dagster.lib.profile import DOMAINS, Profile
from cogumi_dagster.lib.teacher_data import teacher_data_version
from resources.settings import ProfileResource

GRAPH = defs.resolve_asset_graph()
CHAIN = ("source_examples", "teacher_responses", "quality_scores", "curated_examples")
INDEPENDENT = {"student_model", "escalation_detector"}
"""What no teacher data reaches."""
Slot = tuple[str, str | None]


def slots(asset: str) -> list[Slot]:
    """Those that a run of the default profile makes."""
    return [(asset, key) for key in partitions_made(GRAPH.get(dg.AssetKey(asset)).partitions_def, Profile(name="x"))]


MADE = [slot for key in GRAPH.materializable_asset_keys for slot in slots(key.to_user_string())]


def report_made(instance: dg.DagsterInstance, made: Sequence[Slot], version: str) -> None:
    for asset, partition in made:
        tags = {DATA_VERSION: f"{asset}-{partition}-{version}"}
        instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=partition, tags=tags))


def observe(instance: dg.DagsterInstance, versions: Mapping[str, str]) -> None:
    for domain, version in versions.items():
        tags = {DATA_VERSION: version}
        instance.report_runless_asset_event(dg.AssetObservation(TEACHER_DATA, partition=domain, tags=tags))


class House:
    """A graph in which everything has been made, and what automation asks for when something changes."""

    def __init__(self) -> None:
        self.instance = dg.DagsterInstance.ephemeral()
        self.cursor: Any = None
        observe(self.instance, dict.fromkeys(DOMAINS, "old"))
        report_made(self.instance, MADE, "1")
        assert self.tick() == set()

    def tick(self) -> set[Slot]:
        result = dg.evaluate_automation_conditions(defs, instance=self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        return {
            (key.to_user_string(), partition)
            for key in GRAPH.materializable_asset_keys
            for partition in result.get_requested_partitions(key)
        }

    def settle(self, version: str) -> set[Slot]:
        """Make what is asked for, tick by tick, until nothing is; all that was made.

        A fan-in may be asked for twice: after its first input, and after the one that comes in a later run.
        """
        made: set[Slot] = set()
        for _ in range(30):
            asked = self.tick()
            if not asked:
                return made
            made |= asked
            report_made(self.instance, sorted(asked, key=str), version)
        raise AssertionError("automation never comes to rest")


def chain(domain: str) -> set[Slot]:
    return {(asset, domain) for asset in CHAIN}


def test_a_change_of_one_domain_makes_its_chain_and_all_that_is_downstream() -> None:
    house = House()
    observe(house.instance, {"math": "new"})
    assert house.tick() == chain("math"), "one run makes the chain"
    report_made(house.instance, sorted(chain("math"), key=str), "2")
    later = house.settle("2")
    others = {slot for domain in DOMAINS for slot in chain(domain)}
    assert later == {slot for slot in MADE if slot not in others and slot[0] not in INDEPENDENT}
    assert ("distillation_dataset", None) in later
    assert ("model_card", None) in later


def test_the_same_version_again_makes_nothing() -> None:
    house = House()
    observe(house.instance, {"math": "old"})
    assert house.tick() == set()


def test_what_is_made_again_with_the_same_bytes_goes_no_further() -> None:
    house = House()
    observe(house.instance, {"code": "new"})
    assert house.tick() == chain("code")
    report_made(house.instance, sorted(chain("code"), key=str), "1")
    assert house.tick() == set()


def test_the_ui_opened_after_a_run_from_the_command_line_asks_for_nothing(
    settings: ProfileResource,
) -> None:
    instance = dg.DagsterInstance.ephemeral()
    assert observe_teacher_data(instance, settings) == list(DOMAINS)
    report_made(instance, MADE, "1")
    first = dg.evaluate_automation_conditions(defs, instance=instance)
    sensed = teacher_data_sensor(dg.build_sensor_context(instance=instance), settings=settings)
    for event in sensed.asset_events:
        instance.report_runless_asset_event(event)
    second = dg.evaluate_automation_conditions(defs, instance=instance, cursor=first.cursor)
    assert (first.total_requested, second.total_requested) == (0, 0)
    assert observe_teacher_data(instance, settings) == []
    path = settings.sources / "math.yaml"
    path.write_text(path.read_text() + "# one more line\n")
    assert observe_teacher_data(instance, settings) == ["math"]


def test_what_was_never_made_is_left_to_its_first_run() -> None:
    instance = dg.DagsterInstance.ephemeral()
    first = dg.evaluate_automation_conditions(defs, instance=instance)
    report_made(instance, [("source_examples", "math")], "1")
    second = dg.evaluate_automation_conditions(defs, instance=instance, cursor=first.cursor)
    observe(instance, dict.fromkeys(DOMAINS, "first seen"))
    third = dg.evaluate_automation_conditions(defs, instance=instance, cursor=second.cursor)
    assert (first.total_requested, second.total_requested, third.total_requested) == (0, 0, 1)
    assert third.get_requested_partitions(dg.AssetKey("source_examples")) == {"math"}


def fail_check(instance: dg.DagsterInstance, asset: str, check: str, partition: str | None, *, passed: bool) -> None:
    evaluation = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(asset), check_name=check, passed=passed, metadata={}, partition=partition,
        severity=dg.AssetCheckSeverity.ERROR, blocking=True,
    )  # fmt: skip
    instance.report_runless_asset_event(evaluation)


def test_a_failed_blocking_check_stops_what_is_downstream() -> None:
    house = House()
    report_made(house.instance, [("gguf_model", None)], "2")
    fail_check(house.instance, "gguf_model", "export_equals_parent", None, passed=False)
    asked = house.tick()
    assert not {asset for asset, _ in asked} & {"packaged_base", "routing_examples", "domain_failures"}


def test_a_passed_blocking_check_does_not() -> None:
    house = House()
    report_made(house.instance, [("gguf_model", None)], "2")
    fail_check(house.instance, "gguf_model", "export_equals_parent", None, passed=True)
    assert {"packaged_base", "domain_failures"} <= {asset for asset, _ in house.tick()}


# the sensor


@pytest.fixture
def settings(profile: Path) -> ProfileResource:
    return ProfileResource(path=str(profile))


def versions(settings: ProfileResource) -> dict[str, str]:
    return {d: teacher_data_version(settings.profile, d, settings.sources, settings.catalogue) for d in DOMAINS}


def edit_source(settings: ProfileResource, domain: str, text: str = "# one more line\n") -> None:
    path = settings.sources / f"{domain}.yaml"
    path.write_text(path.read_text() + text)


def sense(settings: ProfileResource, cursor: str | None) -> tuple[dict[str, str], str]:
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance, cursor, resources={"settings": settings}) as context,
    ):
        result = teacher_data_sensor(context)
    assert isinstance(result, dg.SensorResult)
    observed = {str(event.partition): event.tags[DATA_VERSION] for event in result.asset_events}
    assert {event.asset_key for event in result.asset_events} <= {dg.AssetKey(TEACHER_DATA)}
    return observed, str(result.cursor)


def test_the_sensor_reports_each_domain_once(settings: ProfileResource) -> None:
    observed, cursor = sense(settings, None)
    assert observed == versions(settings)
    assert sense(settings, cursor) == ({}, cursor)


def test_the_sensor_reports_the_domain_whose_source_was_edited(settings: ProfileResource) -> None:
    _, cursor = sense(settings, None)
    edit_source(settings, "science")
    observed, cursor = sense(settings, cursor)
    assert observed == {"science": versions(settings)["science"]}
    assert sense(settings, cursor)[0] == {}


def test_the_sensor_reports_the_domains_of_a_teacher_that_was_edited(settings: ProfileResource) -> None:
    _, cursor = sense(settings, None)
    path = settings.catalogue
    assert path.parent == Path(settings.path).parent
    text = path.read_text()
    assert text.count("You are a careful assistant.") == 1  # the local teacher's prompt
    path.write_text(text.replace("You are a careful assistant.", "You are a terse assistant."))
    assert sense(settings, cursor)[0].keys() == {"conversation", "creative"}


def test_a_new_price_is_no_change_of_teacher_data(settings: ProfileResource) -> None:
    _, cursor = sense(settings, None)
    text = settings.catalogue.read_text()
    settings.catalogue.write_text(text.replace("usd_per_million_output: 0.0\n", "usd_per_million_output: 0.1\n"))
    assert settings.catalogue.read_text() != text
    assert sense(settings, cursor)[0] == {}


def test_the_sensor_sees_a_change_of_the_mix(settings: ProfileResource, edit_profile: Callable[..., None]) -> None:
    _, cursor = sense(settings, None)
    mix = [{"teacher": "solver", "share": 0.9}, {"teacher": "local", "share": 0.1}]
    edit_profile(teaching__mix__math=mix)
    assert sense(settings, cursor)[0].keys() == {"math"}


def test_a_broken_source_silences_only_its_own_domain(settings: ProfileResource) -> None:
    _, cursor = sense(settings, None)
    edit_source(settings, "math", "familys: []\n")
    edit_source(settings, "code")
    observed, cursor = sense(settings, cursor)
    assert observed.keys() == {"code"}
    path = settings.sources / "math.yaml"
    path.write_text(path.read_text().replace("familys: []\n", ""))
    assert sense(settings, cursor)[0] == {}, "mended to what it was: nothing has changed"


# the reconciling schedule


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """On disk: a schedule opens its instance by reference."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as made:
        yield made


def due(settings: ProfileResource, instance: dg.DagsterInstance) -> dict[str, dg.RunRequest]:
    with dg.build_schedule_context(instance, resources={"settings": settings}) as context:
        requests = teacher_data_reconciliation_schedule(context)
    assert all(isinstance(request, dg.RunRequest) for request in requests)
    return {str(request.partition_key): request for request in requests}


def record_taught(instance: dg.DagsterInstance, found: Mapping[str, str], assets: Sequence[str] = CHAIN[:3]) -> None:
    for domain, version in found.items():
        for asset in assets:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(asset, partition=domain, metadata={TEACHER_DATA: version})
            )


def test_a_domain_that_was_never_made_is_left_to_its_first_run(
    settings: ProfileResource, instance: dg.DagsterInstance
) -> None:
    assert due(settings, instance) == {}


def test_only_the_domain_that_differs_from_its_record_is_due(
    settings: ProfileResource, instance: dg.DagsterInstance
) -> None:
    record_taught(instance, versions(settings))
    assert due(settings, instance) == {}
    edit_source(settings, "math")
    requests = due(settings, instance)
    assert requests.keys() == {"math"}
    record_taught(instance, {"math": versions(settings)["math"]})
    assert due(settings, instance) == {}


def run_of(instance: dg.DagsterInstance, request: dg.RunRequest, status: dg.DagsterRunStatus) -> str:
    run = dg.DagsterRun(job_name="teacher_data_changed_job", tags=dict(request.tags), status=status)
    instance.add_run(run)
    return run.run_id


def test_a_failed_run_is_tried_again_under_another_key(settings: ProfileResource, instance: dg.DagsterInstance) -> None:
    record_taught(instance, versions(settings))
    edit_source(settings, "math")
    edit_source(settings, "code")
    first = due(settings, instance)
    assert due(settings, instance)["math"].run_key == first["math"].run_key
    run_of(instance, first["math"], dg.DagsterRunStatus.FAILURE)
    second = due(settings, instance)
    assert second["math"].run_key != first["math"].run_key
    assert second["code"].run_key == first["code"].run_key, "attempts are counted for each domain"


def test_a_run_that_is_still_going_is_not_doubled(settings: ProfileResource, instance: dg.DagsterInstance) -> None:
    record_taught(instance, versions(settings))
    edit_source(settings, "math")
    run_of(instance, due(settings, instance)["math"], dg.DagsterRunStatus.STARTED)
    assert due(settings, instance) == {}


def test_a_run_that_failed_half_way_is_due_again(settings: ProfileResource, instance: dg.DagsterInstance) -> None:
    record_taught(instance, versions(settings))
    edit_source(settings, "math")
    record_taught(instance, {"math": versions(settings)["math"]}, assets=["source_examples"])
    assert due(settings, instance).keys() == {"math"}


def test_a_return_to_an_old_version_is_seen(settings: ProfileResource, instance: dg.DagsterInstance) -> None:
    old = versions(settings)
    record_taught(instance, old)
    path = settings.sources / "math.yaml"
    text = path.read_text()
    edit_source(settings, "math")
    run_of(instance, due(settings, instance)["math"], dg.DagsterRunStatus.SUCCESS)
    record_taught(instance, {"math": versions(settings)["math"]})
    path.write_text(text)
    assert versions(settings) == old
    assert due(settings, instance).keys() == {"math"}
