"""The store over S3, spoken over HTTP to moto's server through dagster-aws."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto.server import ThreadedMotoServer

from cogumi_dagster.lib.artifacts import CURRENT, MANIFEST, ArtifactRef, ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from resources import build_resources
from resources.artifact_store import S3Remote

BUCKET = "models"
OpenStore = Callable[..., ArtifactStore]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def open_store(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenStore:
    """``open_store("a")`` is the store as machine ``a`` sees it: one bucket, a cache folder of its own."""
    import boto3

    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])

    def open_as(machine: str, **changed: Any) -> ArtifactStore:
        store = {"kind": "s3", "bucket": BUCKET, "endpoint_url": endpoint, "prefix": "team/cogumi"} | changed
        profile = tmp_path / f"{machine}.yaml"
        profile.write_text(yaml.safe_dump({"store": {**store, "path": str(tmp_path / machine)}}))
        return build_resources(str(profile))["store"].open()  # type: ignore[no-any-return]

    return open_as


def write(store: ArtifactStore, text: str = "weights", partition: str | None = None) -> ArtifactRef:
    with store.write("gguf_model", partition, config={"seed": 0}) as draft:
        (draft.path / "model.gguf").write_text(text)
        (draft.path / "logs").mkdir()
        (draft.path / "logs" / "loss.txt").write_text("0.5")
        draft.metrics = {"report": {"bytes": len(text)}}
    assert draft.ref
    return draft.ref


def remote_of(store: ArtifactStore) -> S3Remote:
    assert isinstance(store.remote, S3Remote)
    return store.remote


def keys(store: ArtifactStore) -> set[str]:
    remote = remote_of(store)
    return set(remote.keys(""))


def test_what_one_machine_writes_another_reads(open_store: OpenStore) -> None:
    here, there = open_store("a"), open_store("b")
    assert there.current("gguf_model") is None
    written = write(here)
    found = there.get("gguf_model")
    assert found.manifest == written.manifest
    assert (found.path / "model.gguf").read_text() == "weights"
    assert (found.path / "logs" / "loss.txt").read_text() == "0.5"
    assert found.path.is_relative_to(there.root)
    assert not list(there.root.rglob(".tmp-*"))


def test_objects_lie_below_the_prefix_by_version(open_store: OpenStore) -> None:
    store = open_store("a")
    version = f"v-{write(store).version[:12]}"
    assert keys(store) == {
        f"gguf_model/_/{version}/model.gguf", f"gguf_model/_/{version}/logs/loss.txt",
        f"gguf_model/_/{version}/{MANIFEST}", f"gguf_model/_/{CURRENT}",
    }  # fmt: skip
    remote = remote_of(store)
    listed = remote.client.list_objects_v2(Bucket=BUCKET)["Contents"]
    assert all(item["Key"].startswith("team/cogumi/gguf_model/") for item in listed)


def test_a_new_version_reaches_a_machine_that_holds_the_old_one(open_store: OpenStore) -> None:
    here, there = open_store("a"), open_store("b")
    write(here, "old")
    assert (there.get("gguf_model").path / "model.gguf").read_text() == "old"
    write(here, "new")
    assert (there.get("gguf_model").path / "model.gguf").read_text() == "new"


def test_partitions_are_apart_and_all_are_listed_from_an_empty_cache(open_store: OpenStore) -> None:
    here = open_store("a")
    write(here, "one", "code")
    write(here, "two", "math")
    write(here, "all")
    listed = open_store("b").artifacts()
    assert [ref.manifest.partition for ref in listed] == ["code", "math", None]


class Wire:
    """A remote that notes what is uploaded, and breaks when it is told to."""

    def __init__(self, remote: S3Remote, break_at: str = "") -> None:
        self.remote, self.break_at = remote, break_at
        self.uploaded: list[str] = []
        self.download, self.read, self.keys = remote.download, remote.read, remote.keys

    def upload(self, path: Path, key: str) -> None:
        if self.break_at and key.endswith(self.break_at):
            raise CogumiError("the line is cut")
        self.uploaded.append(key.rsplit("/", 1)[-1])
        self.remote.upload(path, key)


def test_the_manifest_follows_the_files_and_the_pointer_comes_last(open_store: OpenStore) -> None:
    store = open_store("a")
    store.remote = wire = Wire(remote_of(store))
    write(store)
    assert sorted(wire.uploaded[:2]) == ["loss.txt", "model.gguf"]
    assert wire.uploaded[2:] == [MANIFEST, CURRENT]


@pytest.mark.parametrize("break_at", ["model.gguf", MANIFEST, CURRENT])
def test_an_upload_that_breaks_off_changes_nothing_for_others(open_store: OpenStore, break_at: str) -> None:
    here, there = open_store("a"), open_store("b")
    write(here, "old")
    here.remote = Wire(remote_of(here), break_at)
    with pytest.raises(CogumiError, match="the line is cut"):
        write(here, "new")
    assert (there.get("gguf_model").path / "model.gguf").read_text() == "old"
    here.remote = there.remote
    write(here, "new")
    assert (there.get("gguf_model").path / "model.gguf").read_text() == "new"


@pytest.mark.parametrize("content", [b"weightz", b"weight", b""])
def test_a_damaged_object_is_refused_and_leaves_nothing(open_store: OpenStore, content: bytes) -> None:
    here, there = open_store("a"), open_store("b")
    version = write(here).version
    remote = remote_of(here)
    key = f"team/cogumi/gguf_model/_/v-{version[:12]}/model.gguf"
    remote.client.put_object(Bucket=BUCKET, Key=key, Body=content)
    with pytest.raises(
        CogumiError, match=r"gguf_model: the copy in the object store is damaged: model.gguf has changed"
    ):
        there.get("gguf_model")
    assert not list(there.root.rglob("model.gguf"))


def test_an_annotation_reaches_the_bucket(open_store: OpenStore) -> None:
    here = open_store("a")
    here.annotate(write(here), checks=[{"check": "perplexity", "passed": True}])
    report = open_store("b").get("gguf_model").manifest.metrics
    assert report == {"report": {"bytes": 7}, "checks": [{"check": "perplexity", "passed": True}]}


def test_a_bucket_that_is_not_there_is_explained(open_store: OpenStore) -> None:
    store = open_store("a", bucket="nowhere")
    for use in (lambda: store.current("gguf_model"), lambda: write(store), store.artifacts):
        with pytest.raises(CogumiError, match=r"s3://nowhere: .*does not exist") as caught:
            use()
        assert "store.bucket" in caught.value.mend


def test_a_server_that_does_not_answer_is_explained(open_store: OpenStore) -> None:
    store = open_store("a", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(CogumiError, match="Could not connect to the endpoint") as caught:
        store.current("gguf_model")
    assert caught.value.retryable


def test_more_objects_than_one_page_are_listed(open_store: OpenStore) -> None:
    remote = remote_of(open_store("a"))
    remote.client.meta.events.register("before-parameter-build.s3.ListObjectsV2", _two_a_page)
    for number in range(5):
        remote.client.put_object(Bucket=BUCKET, Key=f"team/cogumi/many/{number}", Body=b"")
    assert remote.keys("") == [f"many/{number}" for number in range(5)]
    assert remote.keys("/4") == ["many/4"]


def _two_a_page(params: dict[str, Any], **_: Any) -> None:
    params["MaxKeys"] = 2


def test_the_pointer_is_json_that_names_the_version(open_store: OpenStore) -> None:
    store = open_store("a")
    version = write(store).version
    remote = remote_of(store)
    assert json.loads(remote.read(f"gguf_model/_/{CURRENT}") or b"") == {"data_version": version}
    assert remote.read("gguf_model/_/absent") is None
