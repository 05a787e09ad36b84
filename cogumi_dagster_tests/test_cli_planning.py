"""``cogumi plan --student`` and ``--budget`` as a user meets them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogumi_dagster import cli
from cogumi_dagster.commands import planning
from cogumi_dagster.lib.planning.hardware import THIS_MACHINE, Device

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """arguments of ``cogumi plan`` -> (exit status, output, errors), in an empty folder, at fixed speeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning.console, "width", 100)
    machine = Device(THIS_MACHINE, 1e11, 16_000_000_000, 2e10, 4, 0.5, "made up")
    monkeypatch.setattr(planning, "this_machine", lambda: machine)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cogumi", "plan", *arguments])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        said = capsys.readouterr()
        return status, said.out, " ".join(said.err.split())

    return call


def test_a_budget_brings_proposals_and_reasons(plan: Plan, tmp_path: Path) -> None:
    status, out, _ = plan("--budget", "520MB", "-p", "quick")
    assert status == 0
    assert "SmolLM2-135M fits 520 MB" in out and "What fits 520 MB, lowest predicted loss first" in out
    assert "Qwen3-0.6B" in out and "Llama-3.1-8B  0.52" in out and "rule of thumb" in out
    assert max(map(len, out.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == [], "a plan leaves nothing behind"


def test_what_is_impossible_says_why(plan: Plan) -> None:
    _, out, _ = plan("--student", "Llama-3.1-8B", "--budget", "520MB", "-p", "tiny")
    said = " ".join(out.split())
    assert "Llama-3.1-8B cannot fit 520 MB: 8.03B weights in 520 MB leave 0.52 bits for each" in said


def test_a_student_s_plan_reads_well_and_is_whole_as_json(plan: Plan) -> None:
    status, out, _ = plan("--student", "HuggingFaceTB/SmolLM2-135M-Instruct", "-p", "tiny")
    assert status == 0
    for part in (
        "134,515,008 parameters", "16-bit checkpoint", "269.1 MB", "NF4 weights", "Q4_K_M", "modifier code, rank 4",
        "base adapter", THIS_MACHINE, "H100 SXM", "solver", "usd, at most",
    ):  # fmt: skip
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 100
    data = json.loads(plan("--student", "SmolLM2-135M", "--budget", "100MB", "-p", "tiny", "--json")[1])
    assert set(data) == {"plan", "teachers", "verdict", "proposals", "impossible"}
    assert data["verdict"]["fitting"] and len(data["plan"]["devices"]) == 7
    assert data["teachers"]["calls"] > 0
    assert {row["student"] for row in data["impossible"]} > {"Qwen3-0.6B", "Llama-3.1-8B"}


def test_bad_input_is_one_sentence(plan: Plan) -> None:
    for arguments, problem, mend in (
        (("--budget", "520 potatoes"), "the budget '520 potatoes' is no size", "such as 520MB"),
        (("--student", "Qwen3-0.6"), "there is no student 'Qwen3-0.6'", "did you mean 'Qwen3-0.6B'?"),
        (("dataset", "--budget", "1GB"), "takes no --student or --budget", "leave one of them out"),
        (("--budget", "1GB", "-p", "tinny"), "there is no profile 'tinny'", "did you mean 'tiny'?"),
    ):
        status, out, err = plan(*arguments)
        assert status == 1 and out == "" and "Traceback" not in err
        assert problem in err and mend in err
