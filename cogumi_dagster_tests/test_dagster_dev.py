"""A real ``dagster dev``: a domain's chain runs again by itself when its source is edited."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError, ReloadRepositoryLocationStatus

import resources
from cogumi_dagster.lib.artifacts import ArtifactStore

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(resources.__file__).resolve().parent
START_SECONDS, RUN_SECONDS, NOTICE_SECONDS, STOP_SECONDS = 120, 240, 300, 60


@dataclass(frozen=True)
class Dev:
    """The running process, its GraphQL client, its instance and the folder of its store and sources."""

    process: subprocess.Popen[bytes]
    client: DagsterGraphQLClient
    folder: Path

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.folder / "cogumi" / "store")

    def observed(self, domain: str) -> str | None:
        """The version of teacher data that the sensor saw last."""
        with dg.DagsterInstance.from_config(str(self.folder / "dagster_home")) as instance:
            record = instance.get_latest_data_version_record(
                dg.AssetKey("teacher_data"), is_source=True, partition_key=domain
            )
            observation = record.asset_observation if record else None
            return observation.tags["dagster/data_version"] if observation else None

    def materialize(self, asset: str, partition: str) -> None:
        run_id = self.client.submit_job_execution(
            "__ASSET_JOB",
            repository_location_name="cogumi_dagster",
            repository_name="__repository__",
            tags={"dagster/partition": partition},
            asset_selection=[asset],
        )
        wait_for(lambda: self.client.get_run_status(run_id).value in ("SUCCESS", "FAILURE"), RUN_SECONDS, "the run")
        assert self.client.get_run_status(run_id) == dg.DagsterRunStatus.SUCCESS


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(1)


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(ROOT / "dagster.yaml", home)
    shutil.copytree(SHIPPED / "sources", tmp_path / "sources")
    profile = yaml.safe_load((SHIPPED / "profiles" / "tiny.yaml").read_text())
    profile["store"] = {"path": str(tmp_path / "cogumi" / "store")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "DAGSTER_HOME": str(home), "COGUMI_HOME": str(tmp_path),
        "COGUMI_PROFILE": str(tmp_path / "tiny.yaml"), "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(ROOT / "workspace.yaml"), "-p", str(port)]
    with (tmp_path / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-h", "127.0.0.1"], cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Dev(process, _client(process, port, tmp_path / "dev.log"), tmp_path)
    finally:
        _stop(process)


def _client(process: subprocess.Popen[bytes], port: int, log: Path) -> DagsterGraphQLClient:
    """Once the server answers and has loaded the code location."""
    client = DagsterGraphQLClient("127.0.0.1", port_number=port)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            loaded = client.reload_repository_location("cogumi_dagster")
            assert loaded.status == ReloadRepositoryLocationStatus.SUCCESS, loaded.message
            return client
        except DagsterGraphQLClientError:
            time.sleep(1)
    raise AssertionError(f"dagster dev did not start in {START_SECONDS} s:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGINT, as Ctrl-C; the group is killed only where that does not end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_edited_source_is_noticed_and_its_asset_made_again(dev: Dev) -> None:
    for domain in ("math", "code"):
        dev.materialize("source_examples", domain)
    math, code = (dev.store.get("source_examples", domain).manifest for domain in ("math", "code"))

    wait_for(lambda: dev.observed("math") == math.inputs["teacher_data[math]"], NOTICE_SECONDS, "the first observation")
    source = dev.folder / "sources" / "math.yaml"
    source.write_text(source.read_text().replace("weight: 2", "weight: 5"))
    wait_for(
        lambda: dev.store.get("source_examples", "math").manifest.inputs != math.inputs,
        NOTICE_SECONDS,
        "the new version",
    )

    again = dev.store.get("source_examples", "math").manifest
    assert again.inputs == {"teacher_data[math]": dev.observed("math")}
    assert again.data_version != math.data_version
    assert dev.store.get("source_examples", "code").manifest.created == code.created, "another domain's stays"
    never_made = dev.store.root / "source_examples" / "science"
    assert not never_made.exists(), "what was never made is left to its first run"
