"""The router: what it decides, what it reports, and what it refuses to load."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.statistics import report_json
from cogumi_dagster.lib.profile import RoutingConfig
from cogumi_dagster.lib.routing import calibration as cal
from cogumi_dagster.lib.routing.features import read_examples
from cogumi_dagster.lib.routing.network import Network, fit_network, parameter_count
from cogumi_dagster.lib.routing.router import Blend, Router, choose_thresholds, fit_blend, fit_router
from cogumi_dagster.lib.routing.router_evaluation import HeldOutRouting, RouterReport, report_routing

MakeRows = Callable[..., list[dict[str, Any]]]

CONFIG = RoutingConfig()
SURE, UNSURE = [-0.01, -0.02, -0.01, -0.03], [-4.0, -3.0, -5.0, -2.5]


def fit(rows: list[dict[str, Any]], out: Path) -> RouterReport:
    examples = read_examples(rows)
    calibration = cal.choose_and_fit(examples, cal.hold_out(examples, 0).fit, 0)
    return fit_router(rows, calibration, CONFIG, 0, out)


@pytest.fixture(scope="module")
def fitted(make_rows: MakeRows, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RouterReport]:
    out = tmp_path_factory.mktemp("router")
    return out, fit(make_rows(240, seed=1, test_share=0.35), out)


def test_the_network_has_the_specifications_size(fitted: tuple[Path, RouterReport]) -> None:
    out, report = fitted
    assert parameter_count((64, 32)) == report.parameters == 10_369
    assert Router.load(out).network.parameters == 10_369
    assert report.bytes < 100_000


def test_the_numpy_network_is_sklearns() -> None:
    from sklearn.neural_network import MLPClassifier

    draw = np.random.default_rng(0)
    features = draw.normal(size=(60, 128))
    passed = (features[:, 120] > 0).astype(float)
    features[:, 112:] = features[:, 112:] * 5 - 40  # far from standard, as log-probabilities are
    found = fit_network(features, passed, (64, 32), seed=0)
    model = MLPClassifier((64, 32))
    model.partial_fit(features, passed.astype(int), classes=[0, 1])
    model.coefs_ = [weights.astype(np.float64) for weights, _ in found.layers]
    model.intercepts_ = [bias.astype(np.float64) for _, bias in found.layers]
    assert found.probabilities(features) == pytest.approx(model.predict_proba(features)[:, 1], abs=1e-5)
    assert ((found.probabilities(features) > 0.5) == passed).mean() > 0.9


def test_a_network_of_another_shape_is_refused() -> None:
    network = fit_network(np.zeros((4, 128)), np.ones(4), (64, 32), seed=0)
    with pytest.raises(CogumiError, match="weights0 has shape"):
        Network.from_arrays(network.to_arrays(), (32, 32))


def test_sure_answers_stay_with_the_base_and_unsure_ones_go_to_the_domains_modifier(
    fitted: tuple[Path, RouterReport],
) -> None:
    router = Router.load(fitted[0])
    code, math_, poem = "python function parse loop", "sum price percent apples", "poem about moon and river"
    assert router.decide(code, SURE, 4).route == "base"
    assert router.decide(code, UNSURE, 4).route == "code"
    assert router.decide(math_, UNSURE, 4).route == "reasoning"
    decision = router.decide(poem, UNSURE, 4)
    assert (decision.route, decision.modifier, decision.domain) == ("base", None, "creative")
    assert router.decide(code, UNSURE, 4).confidence < router.decide(code, SURE, 4).confidence
    assert decision.seconds > 0


def test_an_answer_without_log_probabilities_is_not_trusted(fitted: tuple[Path, RouterReport]) -> None:
    decision = Router.load(fitted[0]).decide("python function parse loop", [], 4)
    assert (decision.route, decision.confidence) == ("code", 0.0)


def test_the_report_is_on_the_test_split_and_adds_up(fitted: tuple[Path, RouterReport]) -> None:
    _, report = fitted
    shown = report_json(report)
    json.dumps(shown, allow_nan=False)
    systems = {name: share.value for name, share in report.systems.items()}
    assert report.held_out.startswith("the test split")
    assert systems["base"] < systems["routed"] <= systems["oracle"]
    gain = (systems["routed"] - systems["base"]) / (systems["oracle"] - systems["base"])
    assert report.gain_recovered.value == pytest.approx(gain)
    against = report.against["base"]
    assert against.difference.value == pytest.approx(systems["routed"] - systems["base"])
    assert (against.wins - against.losses) / report.rows == pytest.approx(against.difference.value)
    assert report.of_router.auroc.value > 0.65
    assert report.domain_accuracy.value > 0.9 > report.domain_majority.value
    assert sum(row["rows"] for row in report.by_domain.values()) == report.rows
    assert 0 < report.milliseconds_median <= report.milliseconds_p99


def test_labels_without_signal_are_not_reported_as_signal(make_rows: MakeRows, tmp_path: Path) -> None:
    """Reported on its own training rows, a network of 10,369 parameters would show an AUROC near 1."""
    rows = make_rows(45, seed=5)
    draw = np.random.default_rng(0)
    for row in rows:
        row["base"]["passed"] = bool(draw.random() < 0.5)
    report = fit(rows, tmp_path)
    assert "cross-fitted on 45 rows" in report.held_out
    assert report.rows == 45
    assert report.of_network.auroc.low < 0.5
    assert report.of_router.auroc.low < 0.5


def test_one_class_gives_a_constant_router_and_says_so(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(24)
    for row in rows:
        row["base"]["passed"] = True
    report = fit(rows, tmp_path)
    assert "every answer of the base was right" in report.notes[0]
    assert report_json(report)["of_router"]["auroc"]["value"] is None
    assert math.isnan(report.gain_recovered.value)
    router = Router.load(tmp_path)
    assert router.decide("python function", UNSURE, 4).route == "base"


def test_a_base_that_is_never_right_always_hands_over(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(24)
    for row in rows:
        row["base"]["passed"] = False
        row["modifiers"] = {name: {"passed": True} for name in row["modifiers"]}
    report = fit(rows, tmp_path)
    assert report.systems["routed"] == report.systems["oracle"]
    assert Router.load(tmp_path).decide("python function parse", SURE, 4).route == "code"


def test_the_same_rows_give_the_same_files(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(24)
    for name in ("a", "b"):
        fit(rows, tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_too_few_rows_and_two_modifiers_of_one_domain_are_refused(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = make_rows(24)
    calibration = cal.choose_and_fit(read_examples(rows), np.arange(24), 0)
    with pytest.raises(CogumiError, match="19 routing examples"):
        fit_router(rows[:19], calibration, CONFIG, 0, tmp_path)
    rows[3]["modifier"] = "automation"
    with pytest.raises(CogumiError, match="domain 'code' has two modifiers"):
        fit_router(rows, calibration, CONFIG, 0, tmp_path)


def test_without_any_modifier_the_base_answers_all(make_rows: MakeRows, tmp_path: Path) -> None:
    rows = [{**row, "modifier": None, "modifiers": {}} for row in make_rows(60, seed=2)]
    report = fit(rows, tmp_path)
    assert report.escalated.value == 0 and report.systems["routed"].value == report.systems["base"].value
    router = Router.load(tmp_path)
    decision = router.decide("a python function", [-3.0, -2.0], 2)
    assert decision.route == "base" and decision.modifier is None and 0 <= decision.confidence <= 1


@pytest.mark.parametrize("name", ["router.json", "weights.npz", "calibration.json"])
def test_a_router_with_a_missing_or_broken_file_is_refused(
    fitted: tuple[Path, RouterReport], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "router"
    shutil.copytree(fitted[0], folder)
    (folder / name).write_bytes(b"\x00\x01")
    with pytest.raises(CogumiError, match=r"broken|not a calibration"):
        Router.load(folder)
    (folder / name).unlink()
    with pytest.raises(CogumiError, match=r"lacks|there is no calibration"):
        Router.load(folder)


def test_a_router_of_other_features_is_refused(fitted: tuple[Path, RouterReport], tmp_path: Path) -> None:
    folder = tmp_path / "router"
    shutil.copytree(fitted[0], folder)
    card = json.loads((folder / "router.json").read_text())
    (folder / "router.json").write_text(json.dumps({**card, "features": "older"}))
    with pytest.raises(CogumiError, match="reads features 'older'"):
        Router.load(folder)


def test_thresholds_keep_what_the_base_gets_right(make_rows: MakeRows) -> None:
    """Code: wrong below 0.5 where the modifier is right. Math: the modifier never gains."""
    rows = make_rows(90)
    confidence = np.linspace(0, 1, 90)
    for row, sure in zip(rows, confidence, strict=True):
        row["base"]["passed"] = bool(sure >= 0.5) or row["domain"] == "math"
        if row["modifier"]:
            row["modifiers"] = {row["modifier"]: {"passed": row["domain"] == "code" and bool(sure < 0.5)}}
    examples = read_examples(rows)
    found = choose_thresholds(
        examples, np.arange(90), confidence, {"code": "code", "math": "reasoning", "creative": None}, target=0.8
    )
    assert found["code"] == pytest.approx(0.5, abs=0.05)
    assert found["math"] < 0.02 and found["creative"] == 0.0


def test_the_blend_leaves_out_an_opinion_that_points_the_wrong_way() -> None:
    draw = np.random.default_rng(0)
    passed = (draw.random(200) < 0.5).astype(float)
    good, bad = np.where(passed == 1, 0.7, 0.3), np.where(passed == 1, 0.4, 0.6)
    noise = draw.normal(scale=0.08, size=(200, 2))
    blend = fit_blend(np.clip(np.column_stack([good, bad]) + noise, 0.01, 0.99), passed)
    assert blend.network > 0 and blend.calibration == 0.0
    assert fit_blend(np.full((20, 2), 0.5), np.ones(20)) == Blend(0.0, 0.0, pytest.approx(math.log(21)))  # type: ignore[arg-type]


def scored(rows: list[dict[str, Any]], routes: list[str | None]) -> RouterReport:
    examples = read_examples(rows)
    confidence = np.full((len(rows), 3), 0.5)
    held_out = HeldOutRouting(
        np.arange(len(rows)), np.zeros(len(rows), dtype=int), confidence, tuple(routes), examples.domains
    )
    return report_routing(
        examples, held_out, 0, description="by hand", thresholds={}, parameters=1, bytes_saved=1,
        seconds=np.array([0.001]), notes=(),
    )  # fmt: skip


def test_systems_by_hand(make_rows: MakeRows) -> None:
    rows = make_rows(20)
    outcomes = [(False, True), (True, False), (True, True), (False, False)] * 5
    for row, (base, own) in zip(rows, outcomes, strict=True):
        row.update(domain="code", modifier="code", modifiers={"code": {"passed": own}})
        row["base"]["passed"] = base
    perfect = scored(rows, ["code" if own and not base else None for base, own in outcomes])
    assert {name: share.value for name, share in perfect.systems.items()} == {
        "routed": 0.75, "base": 0.5, "own_modifier": 0.5, "best_single": 0.5, "oracle": 0.75,
    }  # fmt: skip
    assert perfect.gain_recovered.value == 1.0
    assert perfect.random_accuracy == 0.5
    worst = scored(rows, ["code" if base and not own else None for base, own in outcomes])
    assert worst.systems["routed"].value == 0.25 and worst.gain_recovered.value == -1.0


def test_a_row_sent_to_a_modifier_that_was_not_run_counts_as_wrong(make_rows: MakeRows) -> None:
    rows = make_rows(20)
    for row in rows:
        row["base"]["passed"] = True
    report = scored(rows, ["automation"] + [None] * 19)
    assert report.systems["routed"].successes == 19
    assert report.systems["oracle"].successes == 20
    assert any("1 rows were sent to a modifier that was not run" in note for note in report.notes)


def test_confidence_is_the_blend_of_network_and_calibration(
    make_rows: MakeRows, fitted: tuple[Path, RouterReport]
) -> None:
    router = Router.load(fitted[0])
    examples = read_examples(make_rows(20, seed=9))
    only = replace(router, blend=Blend(0.0, 1.0, 0.0))
    assert only.confidences(examples.features) == pytest.approx(
        router.calibration.probabilities(examples.confidence), abs=1e-6
    )
