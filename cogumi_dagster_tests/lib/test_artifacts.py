import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cogumi_dagster.lib import artifacts
from cogumi_dagster.lib.artifacts import CURRENT, MANIFEST, ArtifactRef, ArtifactStore, fingerprint_of
from cogumi_dagster.lib.errors import CogumiError


class DictRemote:
    """An object store in a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.downloads = 0

    def upload(self, path: Path, key: str) -> None:
        self.objects[key] = path.read_bytes()

    def download(self, key: str, path: Path) -> None:
        self.downloads += 1
        path.write_bytes(self.objects[key])

    def read(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def keys(self, suffix: str) -> list[str]:
        return [key for key in self.objects if key.endswith(suffix)]


def make(store: ArtifactStore, text: str = "hello", asset: str = "model", partition: str | None = None) -> ArtifactRef:
    with store.write(asset, partition, config={"a": 1}, inputs={"up": "0" * 64}) as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "weights.bin").write_text(text)
        draft.metrics["score"] = 0.5
    assert draft.ref is not None
    return draft.ref


def visible(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("*/*/*") if not p.name.startswith(".tmp-"))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store", profile="tiny")


def test_what_was_written_is_read_back_with_its_record(store: ArtifactStore) -> None:
    written = make(store, partition="code")
    found = store.get("model", "code")
    assert found == written
    assert (found.path / "deep" / "weights.bin").read_text() == "hello"
    assert found.manifest.files["deep/weights.bin"].bytes == found.manifest.bytes == 5
    assert found.manifest.metrics == {"score": 0.5}
    assert found.manifest.fingerprint == fingerprint_of("1", {"a": 1}, {"up": "0" * 64})
    assert found.manifest.profile == "tiny"
    assert store.current("model") is None, "a partition is not the unpartitioned asset"


def test_a_block_that_raises_leaves_what_was_there(store: ArtifactStore) -> None:
    before = make(store)
    with pytest.raises(RuntimeError, match="boom"), store.write("model") as draft:
        (draft.path / "half").write_text("half")
        raise RuntimeError("boom")
    assert store.get("model") == before
    assert not list(store.root.glob("*/*/.tmp-*"))


def write_and_hang(root: Path, ready: str) -> None:
    with ArtifactStore(root).write("model") as draft:
        (draft.path / "half").write_text("half")
        Path(ready).touch()
        signal.pause()


def test_a_killed_writer_leaves_nothing_visible_and_its_draft_is_swept(store: ArtifactStore, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("fork").Process(target=write_and_hang, args=(store.root, str(ready)))
    process.start()
    while not ready.exists():
        process.join(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.current("model") is None
    assert store.artifacts() == []
    assert visible(store.root) == []
    assert len(list(store.root.glob("*/*/.tmp-*"))) == 1
    make(store)
    assert not list(store.root.glob("*/*/.tmp-*"))


def test_the_draft_of_a_running_writer_is_not_swept(store: ArtifactStore, tmp_path: Path) -> None:
    draft = store.root / "model" / "_" / f".tmp-{os.getppid()}-abcd"
    draft.mkdir(parents=True)
    make(store)
    assert draft.is_dir()


def test_same_content_has_the_same_version_whatever_made_it(store: ArtifactStore) -> None:
    first = make(store)
    with store.write("model", code_version="2") as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "weights.bin").write_text("hello")
    assert draft.ref is not None
    assert draft.ref.version == first.version
    assert draft.ref.manifest.fingerprint != first.manifest.fingerprint
    assert store.get("model").manifest.code_version == "2"
    other = make(store, "hello!")
    assert other.version != first.version
    assert store.get("model") == other
    assert len([name for name in visible(store.root) if name.startswith("v-")]) == 2


def test_a_renamed_file_is_another_version(store: ArtifactStore) -> None:
    first = make(store)
    with store.write("model") as draft:
        (draft.path / "weights.bin").write_text("hello")
    assert draft.ref is not None and draft.ref.version != first.version


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "deep/weights.bin").write_text("hellO"), "deep/weights.bin has changed"),
        (lambda f: (f / "deep/weights.bin").unlink(), "deep/weights.bin is missing"),
        (lambda f: (f / "extra").touch(), "extra does not belong there"),
        (lambda f: (f / MANIFEST).unlink(), "its folder or manifest is missing"),
    ],
)
def test_verify_finds_every_change(store: ArtifactStore, damage: Callable[[Path], object], problem: str) -> None:
    make(store, asset="sound")
    ref = make(store)
    assert [row.problem for row in store.verify()] == ["", ""]
    damage(ref.path)
    rows = {row.asset: row.problem for row in store.verify()}
    assert problem in rows["model"]
    assert rows["sound"] == ""


def test_a_damaged_version_is_replaced_when_made_again(store: ArtifactStore) -> None:
    ref = make(store)
    (ref.path / "deep/weights.bin").write_text("hellO")
    make(store)
    assert [row.problem for row in store.verify()] == [""]


def test_get_names_the_command_that_makes_it(store: ArtifactStore) -> None:
    with pytest.raises(CogumiError, match=r"model\[code\] has not been materialized") as caught:
        store.get("model", "code")
    assert caught.value.mend == "cogumi run --profile tiny --select +model --partition code"


def test_an_artifact_whose_file_is_gone_counts_as_not_made(store: ArtifactStore) -> None:
    ref = make(store)
    (ref.path / "deep" / "weights.bin").unlink()
    assert store.current("model") is None


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_names_cannot_leave_the_store(store: ArtifactStore, name: str) -> None:
    with pytest.raises(CogumiError, match="cannot name"):
        store.current(name)
    if name:
        with pytest.raises(CogumiError, match="cannot name"):
            store.current("model", name)


def test_symbolic_links_are_refused(store: ArtifactStore) -> None:
    with pytest.raises(CogumiError, match="symbolic link"), store.write("model") as draft:
        (draft.path / "link").symlink_to("/etc/hostname")
    assert store.current("model") is None


def test_a_full_disk_is_an_error_to_read_and_keeps_the_old_version(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(store)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_write_atomically", full)
        with pytest.raises(CogumiError, match="is full") as caught:
            make(store, "more")
    assert "free some space" in caught.value.mend
    assert store.get("model") == before
    assert not list(store.root.glob("*/*/.tmp-*"))


def test_a_full_disk_inside_the_block_is_the_same_error(store: ArtifactStore) -> None:
    with pytest.raises(CogumiError, match="is full"), store.write("model"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_is_an_error_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CogumiError, match="cannot write below"):
        make(ArtifactStore(tmp_path / "file"))


def test_annotate_changes_only_the_metrics(store: ArtifactStore) -> None:
    ref = make(store)
    noted = store.annotate(ref, score=0.9, checks=[{"passed": True}])
    assert noted.manifest == replace(ref.manifest, metrics={"score": 0.9, "checks": [{"passed": True}]})
    assert store.get("model") == noted
    assert [row.problem for row in store.verify()] == [""]


def test_artifacts_come_in_the_order_of_their_making(store: ArtifactStore) -> None:
    made = [make(store, asset=name, partition=part) for name, part in (("z", None), ("a", "code"), ("m", None))]
    assert store.artifacts() == made


def test_a_remote_fills_an_empty_cache_and_is_verified(tmp_path: Path) -> None:
    remote = DictRemote()
    ref = make(ArtifactStore(tmp_path / "one", remote=remote))
    prefix = f"model/_/v-{ref.version[:12]}"
    assert sorted(remote.objects) == sorted(
        [f"{prefix}/deep/weights.bin", f"{prefix}/{MANIFEST}", f"model/_/{CURRENT}"]
    )
    other = ArtifactStore(tmp_path / "two", remote=remote)
    found = other.get("model")
    assert found.manifest == ref.manifest
    assert (found.path / "deep" / "weights.bin").read_text() == "hello"
    other.get("model")
    assert remote.downloads == 1, "the second read is from the cache"


def test_a_plan_downloads_no_artifact(tmp_path: Path) -> None:
    remote = DictRemote()
    one, two = ArtifactStore(tmp_path / "one", remote=remote), ArtifactStore(tmp_path / "two", remote=remote)
    ref = make(one)
    assert two.recorded("model") == ref.manifest and one.recorded("model") == ref.manifest
    assert remote.downloads == 0 and not list((tmp_path / "two").glob("*/*/v-*"))
    assert two.recorded("other") is None
    assert not list(two.verify()) and not list((tmp_path / "two").glob("*/*/v-*")), "what is not here is no damage"
    (ref.path / "deep" / "weights.bin").unlink()
    assert ArtifactStore(tmp_path / "one").recorded("model") is None, "without a remote the files must be there"


def test_a_damaged_remote_copy_is_refused(tmp_path: Path) -> None:
    remote = DictRemote()
    make(ArtifactStore(tmp_path / "one", remote=remote))
    key = next(key for key in remote.objects if key.endswith("weights.bin"))
    remote.objects[key] = b"hellO"
    other = ArtifactStore(tmp_path / "two", remote=remote)
    with pytest.raises(CogumiError, match="the copy in the object store is damaged"):
        other.current("model")
    assert not list((tmp_path / "two").glob("*/*/v-*"))
    assert not list((tmp_path / "two").glob("*/*/.tmp-*"))


def test_a_remote_manifest_cannot_write_outside_the_store(tmp_path: Path) -> None:
    remote = DictRemote()
    ref = make(ArtifactStore(tmp_path / "one", remote=remote))
    key = f"model/_/v-{ref.version[:12]}/{MANIFEST}"
    manifest = json.loads(remote.objects[key])
    manifest["files"] = {"../../../../escaped": manifest["files"]["deep/weights.bin"]}
    remote.objects[key] = json.dumps(manifest).encode()
    remote.objects[f"model/_/v-{ref.version[:12]}/../../../../escaped"] = b"hello"
    with pytest.raises(CogumiError, match="damaged"):
        ArtifactStore(tmp_path / "two" / "store", remote=remote).current("model")
    assert not list(tmp_path.rglob("escaped"))


def test_a_newer_remote_version_is_seen_and_a_lost_cache_is_mended(tmp_path: Path) -> None:
    remote = DictRemote()
    one, two = ArtifactStore(tmp_path / "one", remote=remote), ArtifactStore(tmp_path / "two", remote=remote)
    make(one)
    two.get("model")
    newer = make(one, "newer")
    assert two.get("model").version == newer.version
    (two.get("model").path / "deep" / "weights.bin").unlink()
    assert two.get("model").version == newer.version, "a damaged cache is downloaded again"
    assert [row.problem for row in two.verify()] == [""]


def test_annotating_reaches_the_remote(tmp_path: Path) -> None:
    remote = DictRemote()
    one = ArtifactStore(tmp_path / "one", remote=remote)
    one.annotate(make(one), score=0.9)
    assert ArtifactStore(tmp_path / "two", remote=remote).get("model").manifest.metrics["score"] == 0.9


def test_the_fingerprint_changes_with_each_thing_that_decides() -> None:
    base = fingerprint_of("1", {"a": 1, "b": 2}, {"x": "1", "y": "2"})
    assert base == fingerprint_of("1", {"b": 2, "a": 1}, {"y": "2", "x": "1"})
    assert (
        len({base, fingerprint_of("2", {"a": 1, "b": 2}, {"x": "1", "y": "2"}), fingerprint_of("1", {"a": 1}, {})}) == 3
    )


def test_a_store_that_cannot_be_written_is_said_before_anything_is_made(store: ArtifactStore) -> None:
    store.root.mkdir(parents=True, exist_ok=True)
    (store.root / "words").write_text("a file where the artifact's folder should be")
    with pytest.raises(CogumiError, match="cannot write below"), store.making("words", None, lambda: None):
        pytest.fail("it was made")
