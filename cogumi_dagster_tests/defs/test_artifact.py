"""``@artifact``, on small assets of the tests' own: reuse, metadata, claims, errors."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cogumi_dagster.defs.artifact import ELSEWHERE, Step, artifact
from cogumi_dagster.defs.claims import Claim, evaluate, ratio
from cogumi_dagster.defs.dataset.assets import teacher_data
from cogumi_dagster.defs.partitions import domain_partitions
from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import Thresholds
from resources import build_resources


@dataclass(frozen=True)
class WordsReport:
    rows: int
    share: Mapping[str, Any]
    path: str
    """A figure by the name of one of the record's own."""


calls: list[str] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def write_words(step: Step, text: str = "one two three") -> WordsReport:
    (step.out / "words.txt").write_text(text)
    share = {"value": 0.75, "low": 0.5, "high": 0.9, "count": 12, "successes": 9}
    return WordsReport(rows=len(text.split()), share=share, path=str(step.out))


def words_asset(body: Callable[[Step], Any] = write_words, **options: Any) -> dg.AssetsDefinition:
    def words(step: Step) -> Any:
        """Some words."""
        calls.append("words")
        return body(step)

    return artifact(group="test", kinds={"python"}, config=("dataset.examples",), **options)(words)


def letters_asset(words: dg.AssetsDefinition) -> dg.AssetsDefinition:
    def letters(step: Step) -> WordsReport:
        """Their letters."""
        calls.append("letters")
        return write_words(step, (step.path("words") / "words.txt").read_text().replace(" ", ""))

    return artifact(group="test", kinds={"python"}, deps=[words])(letters)


def store_of(profile: Path) -> ArtifactStore:
    return build_resources(str(profile))["store"].open()  # type: ignore[no-any-return]


def make(profile: Path, *assets: Any, partition: str | None = None) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        list(assets),
        resources=build_resources(str(profile)),
        instance=dg.DagsterInstance.ephemeral(),
        partition_key=partition,
        raise_on_error=False,
    )


def metadata(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(asset)
    return {name: value.value for name, value in event.metadata.items()}


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    (event,) = [event for event in result.all_events if event.is_step_failure]
    data = event.step_failure_data.user_failure_data
    return str(data.description) if data else str(event.step_failure_data.error)


def drafts(store: ArtifactStore) -> list[Path]:
    return list(store.root.rglob(".tmp-*"))


def test_a_report_becomes_metadata_a_data_version_and_checks(profile: Path) -> None:
    claims = (
        Claim("enough_words", "rows", "words", at_least=3, blocking=True),
        Claim("share", "share", "share", at_least=0.8),
    )
    result = make(profile, words_asset(claims=claims))
    assert result.success

    ref = store_of(profile).get("words")
    shown = metadata(result, "words")
    assert (shown["rows"], shown["files"], shown["bytes"], shown["reused"]) == (3, 1, 13, False)
    assert shown["share"] == "0.750 (9 of 12; 95 %: 0.500 to 0.900)"
    assert shown["path"] == str(ref.path), "a report's own figure must not hide where the artifact is"
    assert shown["dagster/row_count"] == 3
    (event,) = result.asset_materializations_for_node("words")
    assert (event.tags or {})["dagster/data_version"] == ref.version

    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert checks["enough_words"].passed
    assert not checks["share"].passed
    assert checks["share"].severity == dg.AssetCheckSeverity.WARN
    assert checks["share"].metadata["interval"].value == "0.500 to 0.900 (95 %)"
    assert checks["share"].metadata["count"].value == 12
    saved = {check["check"]: check["passed"] for check in ref.manifest.metrics["checks"]}
    assert saved == {"enough_words": True, "share": False}


def test_what_has_not_changed_is_reused(profile: Path) -> None:
    words = words_asset()
    assert make(profile, words, letters_asset(words)).success
    first = store_of(profile).get("words").version
    again = make(profile, words, letters_asset(words))
    assert calls == ["words", "letters"]
    assert metadata(again, "words")["reused"] is True
    (event,) = again.asset_materializations_for_node("words")
    assert (event.tags or {})["dagster/data_version"] == first


def test_claims_of_a_reused_artifact_are_held_against_the_present_thresholds(
    profile: Path, edit_profile: Callable[..., None]
) -> None:
    words = words_asset(claims=(Claim("few", "rows", "words", at_least="min_mean_quality"),))
    edit_profile(thresholds__min_mean_quality=2.0)
    assert all(check.passed for check in make(profile, words).get_asset_check_evaluations())
    edit_profile(thresholds__min_mean_quality=5.0)
    assert not any(check.passed for check in make(profile, words).get_asset_check_evaluations())
    assert calls == ["words"]


def test_only_the_config_that_it_names_makes_it_again(profile: Path, edit_profile: Callable[..., None]) -> None:
    words = words_asset()
    make(profile, words)
    edit_profile(training__max_steps=7)
    make(profile, words)
    assert calls == ["words"]
    edit_profile(dataset__examples=73)
    assert metadata(make(profile, words), "words")["reused"] is False
    assert calls == ["words", "words"]


def test_a_new_code_version_makes_it_again(profile: Path) -> None:
    make(profile, words_asset())
    make(profile, words_asset(code_version="2"))
    assert calls == ["words", "words"]


def test_downstream_follows_the_bytes_of_its_input(profile: Path, edit_profile: Callable[..., None]) -> None:
    words = words_asset()
    make(profile, words, letters_asset(words))
    edit_profile(dataset__examples=73)  # words is made again, to the same bytes
    make(profile, words, letters_asset(words))
    assert calls == ["words", "letters", "words"]
    other = words_asset(lambda step: write_words(step, "four five"), code_version="2")
    make(profile, other, letters_asset(other))
    assert calls[3:] == ["words", "letters"]
    assert store_of(profile).get("letters").manifest.inputs == {"words": store_of(profile).get("words").version}


def test_an_error_that_the_user_must_mend_is_not_retried(profile: Path) -> None:
    def broken(step: Step) -> None:
        raise CogumiError("the key is wrong", "set another one")

    result = make(profile, words_asset(broken, retry_policy=dg.RetryPolicy(max_retries=2)))
    assert not result.success
    assert calls == ["words"]
    assert failure_of(result) == "the key is wrong\n  mend: set another one"


def test_an_error_that_may_pass_is_retried(profile: Path) -> None:
    def busy(step: Step) -> WordsReport:
        if len(calls) < 3:
            raise CogumiError("the teacher is busy", retryable=True)
        return write_words(step)

    assert make(profile, words_asset(busy, retry_policy=dg.RetryPolicy(max_retries=2))).success
    assert calls == ["words"] * 3


@pytest.mark.parametrize("blocking", [True, False])
def test_a_failed_claim_stops_downstream_only_where_it_blocks(profile: Path, blocking: bool) -> None:
    words = words_asset(claims=(Claim("many", "rows", "words", at_least=100, blocking=blocking),))
    result = make(profile, words, letters_asset(words))
    assert calls == (["words"] if blocking else ["words", "letters"])
    assert store_of(profile).current("words") is not None, "what was made stays, to be looked at"
    assert (store_of(profile).current("letters") is None) == blocking
    (check,) = result.get_asset_check_evaluations()
    assert not check.passed


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes")],
)
def test_too_little_memory_says_which_limit_to_raise(profile: Path, error: Exception) -> None:
    def greedy(step: Step) -> None:
        raise error

    result = make(profile, words_asset(greedy))
    assert "compute.memory_gb = 8 GB" in failure_of(result)


def test_another_error_keeps_its_own_words_and_leaves_no_artifact(profile: Path) -> None:
    def half(step: Step) -> None:
        (step.out / "words.txt").write_text("one")
        raise RuntimeError("shapes do not match")

    result = make(profile, words_asset(half))
    assert "shapes do not match" in failure_of(result)
    assert "memory_gb" not in failure_of(result)
    store = store_of(profile)
    assert store.current("words") is None
    assert drafts(store) == []


def test_a_killed_step_leaves_only_a_draft_which_the_next_one_sweeps(profile: Path) -> None:
    def killed(step: Step) -> None:
        (step.out / "words.txt").write_text("one")
        os.kill(os.getpid(), signal.SIGKILL)

    worker = multiprocessing.get_context("fork").Process(target=make, args=(profile, words_asset(killed)))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    store = store_of(profile)
    assert store.current("words") is None
    assert len(drafts(store)) == 1
    assert make(profile, words_asset()).success
    assert drafts(store) == []
    assert store.get("words").manifest.bytes == 13


def test_two_runs_at_once_make_an_artifact_once(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = (multiprocessing.get_context("fork").Event() for _ in range(2))
    heard: list[str] = []

    def slow(step: Step) -> WordsReport:
        begun.set()
        assert go_on.wait(60)
        return write_words(step)

    def listener(asset: str, partition: str | None, done: int, total: int, note: str) -> None:
        heard.append(note)
        if note == ELSEWHERE:
            go_on.set()

    worker = multiprocessing.get_context("fork").Process(target=make, args=(profile, words_asset(slow)))
    worker.start()
    assert begun.wait(60)
    monkeypatch.setattr("cogumi_dagster.defs.artifact.listeners", [listener])
    second = make(profile, words_asset())
    worker.join(60)
    assert worker.exitcode == 0
    assert heard == [ELSEWHERE, "unchanged"]
    assert metadata(second, "words")["reused"] is True
    assert calls == []


def test_a_heavy_step_holds_the_lease_of_the_machine(profile: Path) -> None:
    lease = store_of(profile).root.parent / "gpu.lock"
    make(profile, words_asset())
    assert not lease.exists()
    make(profile, words_asset(pool="gpu", code_version="2"))
    assert lease.read_text() == str(os.getpid())


def test_teacher_data_is_an_input_of_the_domain(profile: Path) -> None:
    words = words_asset(deps=[teacher_data], partitions_def=domain_partitions)
    first = metadata(make(profile, teacher_data, words, partition="math"), "words")["teacher_data"]
    source = profile.parent / "sources" / "code.yaml"
    source.write_text(source.read_text() + "# one more line\n")
    make(profile, teacher_data, words, partition="math")
    assert calls == ["words"], "another domain's sources are nothing to this one"
    source = profile.parent / "sources" / "math.yaml"
    source.write_text(source.read_text() + "# one more line\n")
    second = metadata(make(profile, teacher_data, words, partition="math"), "words")["teacher_data"]
    assert calls == ["words", "words"]
    assert first != second


def test_an_input_that_was_not_made_names_the_command_that_makes_it(profile: Path) -> None:
    words = words_asset()
    result = dg.materialize(
        [words, letters_asset(words)],
        selection=["letters"],
        resources=build_resources(str(profile)),
        instance=dg.DagsterInstance.ephemeral(),
        raise_on_error=False,
    )
    assert "words has not been materialized" in failure_of(result)
    assert "cogumi run --profile tiny --select +words" in failure_of(result)


# claims, without a graph


LIMITS = Thresholds()


@pytest.mark.parametrize("bound", [{"at_least": 0.0}, {"at_most": 1e9}])
@pytest.mark.parametrize(
    "metric", ["score", "absent", "share.deeper", ratio("score", "one"), ratio("one", "zero"), lambda m: m["rows"][3],
               lambda m: max(m["none"]), lambda m: m["absent"]],
)  # fmt: skip
def test_a_figure_that_could_not_be_had_never_passes(metric: Any, bound: dict[str, float]) -> None:
    metrics = {"score": None, "one": 1, "zero": 0, "share": 0.5, "rows": [], "none": []}
    verdict = evaluate(Claim("claim", metric, "it", **bound), metrics, LIMITS)  # type: ignore[arg-type]
    assert verdict.value is None
    assert not verdict.passed
    assert verdict.result().description == "not evaluated"


def test_a_proportion_carries_its_interval_and_count() -> None:
    share = {"value": 0.7, "low": 0.4, "high": 0.9, "count": 10}
    verdict = evaluate(Claim("claim", "share", "it", at_least="auroc"), {"share": share}, LIMITS)
    assert (verdict.value, verdict.interval, verdict.count, verdict.passed) == (0.7, (0.4, 0.9), 10, True)
    assert verdict.threshold == LIMITS.auroc
    nothing = {"value": None, "low": None, "high": None, "count": 0}
    verdict = evaluate(Claim("claim", "share", "it", at_most="auroc"), {"share": nothing}, LIMITS)
    assert (verdict.value, verdict.interval, verdict.count, verdict.passed) == (None, None, 0, False)


@pytest.mark.parametrize(
    ("value", "bound", "passed"),
    [
        (1.0, {"at_least": 1.0}, True), (0.99, {"at_least": 1.0}, False),
        (1.0, {"at_most": 1.0}, True), (1.01, {"at_most": 1.0}, False),
        (0, {"at_most": 0}, True), (True, {"at_least": 1.0}, True), (False, {"at_least": 1.0}, False),
    ],
)  # fmt: skip
def test_bounds_are_inclusive(value: float, bound: dict[str, float], passed: bool) -> None:
    claim = Claim("claim", "figure", "it", **bound)  # type: ignore[arg-type]
    assert evaluate(claim, {"figure": value}, LIMITS).passed is passed


@pytest.mark.parametrize(("blocking", "severity"), [(True, "ERROR"), (False, "WARN")])
def test_severity_says_whether_a_claim_blocks(blocking: bool, severity: str) -> None:
    verdict = evaluate(Claim("claim", "figure", "it", at_least=1, blocking=blocking), {"figure": 0}, LIMITS)
    assert verdict.result().severity.value == severity
    assert json.dumps(verdict.result().description) == '"0 (at least 1)"'
