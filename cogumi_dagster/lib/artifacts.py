"""The artifact store: content-addressed folders with a manifest, written atomically.

Layout, below the root::

    <asset>/<partition or _>/v-<sha12>/...        the files and, written last, manifest.json
    <asset>/<partition or _>/CURRENT.json         which version is the asset's present one
    <asset>/<partition or _>/.tmp-<pid>-<random>  a draft; swept when its writer is gone
    <asset>/<partition or _>/.making              held by whoever makes the asset

A version is named by the SHA-256 of its files' names and contents. A killed writer leaves only a
draft, which nothing reads. With a ``Remote``, every version is also pushed to (and read back from) an
object store; the folder is then a verified cache.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.locks import held

MANIFEST = "manifest.json"
CURRENT = "CURRENT.json"
_DRAFT = ".tmp-"
_MAKING = ".making"


class Remote(Protocol):
    """An object store, as far as artifacts need one."""

    def upload(self, path: Path, key: str) -> None: ...

    def download(self, key: str, path: Path) -> None: ...

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is no such object."""
        ...

    def keys(self, suffix: str) -> list[str]: ...


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and how."""

    asset: str
    partition: str | None
    data_version: str
    fingerprint: str
    """Hash of all that decides the artifact: inputs' versions, config, code version."""
    code_version: str
    inputs: dict[str, str]
    """``asset`` or ``asset[partition]`` -> data version."""
    config: dict[str, Any]
    files: dict[str, FileEntry]
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created: float = 0.0
    profile: str = ""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
        return cls(**{**data, "files": files})


@dataclass(frozen=True)
class ArtifactRef:
    """One version of an artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        return self.manifest.data_version


@dataclass
class Draft:
    """An artifact being written. Fill ``path``; set ``metrics``; ``ref`` is there after the block."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    ref: ArtifactRef | None = None


@dataclass(frozen=True)
class VerifyRow:
    """One artifact re-hashed: ``problem`` is empty where every byte is as the manifest says."""

    asset: str
    partition: str | None
    version: str
    bytes: int
    problem: str


def fingerprint_of(code_version: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 of all that decides an artifact (canonical JSON)."""
    text = json.dumps([code_version, config, dict(sorted(inputs.items()))], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_tree(folder: Path) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CogumiError(f"{path} is a symbolic link", "artifacts hold plain files only")
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = FileEntry(file_sha256(path), path.stat().st_size)
    return files


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


class ArtifactStore:
    """Versioned artifacts below one folder, optionally mirrored in an object store."""

    def __init__(self, root: Path, *, remote: Remote | None = None, profile: str = "") -> None:
        self.root = root
        self.remote = remote
        self.profile = profile

    def _slot(self, asset: str, partition: str | None) -> Path:
        for part in (asset, partition or "_"):
            if not part or "/" in part or part.startswith("."):
                raise CogumiError(f"{part!r} cannot name an artifact or partition")
        return self.root / asset / (partition or "_")

    # reading ------------------------------------------------------------------

    def current(self, asset: str, partition: str | None = None) -> ArtifactRef | None:
        """The present version, or None where the asset has not been made (or its files are gone)."""
        folder = self._pointed(asset, partition)
        if folder is None:
            return None
        ref = _present(folder)
        if ref is None and self.remote is not None:
            self._pull_version(asset, partition, folder)
            ref = _present(folder)
        return ref

    def recorded(self, asset: str, partition: str | None = None) -> Manifest | None:
        """The manifest of ``current``; what lies in the object store only is not downloaded."""
        folder = self._pointed(asset, partition)
        if folder is None:
            return None
        if (ref := _present(folder)) or self.remote is None:
            return ref.manifest if ref else None
        data = self.remote.read(self._key(asset, partition, folder.name, MANIFEST))
        return Manifest.from_json(json.loads(data)) if data is not None else None

    def _pointed(self, asset: str, partition: str | None) -> Path | None:
        """The folder of the present version, whether or not it is there."""
        slot = self._slot(asset, partition)
        pointer = slot / CURRENT
        if self.remote is not None:
            self._pull_pointer(asset, partition, pointer)
        if not pointer.is_file():
            return None
        return slot / f"v-{json.loads(pointer.read_text())['data_version'][:12]}"

    def get(self, asset: str, partition: str | None = None) -> ArtifactRef:
        """The present version; raises CogumiError naming the command that makes it."""
        ref = self.current(asset, partition)
        if ref is None:
            where = f"{asset}[{partition}]" if partition else asset
            select = f"--select +{asset}" + (f" --partition {partition}" if partition else "")
            raise CogumiError(
                f"{where} has not been materialized in {self.root}", f"cogumi run --profile {self.profile} {select}"
            )
        return ref

    def artifacts(self) -> list[ArtifactRef]:
        """Every present version, in the order of its making."""
        slots = {pointer.parent.relative_to(self.root).parts for pointer in self.root.glob(f"*/*/{CURRENT}")}
        if self.remote is not None:
            slots |= {tuple(key.split("/")[:2]) for key in self.remote.keys(f"/{CURRENT}")}
        found = [self.current(asset, None if partition == "_" else partition) for asset, partition in sorted(slots)]
        refs = [ref for ref in found if ref is not None]
        return sorted(refs, key=lambda ref: ref.manifest.created)

    def verify(self) -> Iterator[VerifyRow]:
        """Re-hash every present version that is on this machine; one that only the object store has is left out."""
        for pointer in sorted(self.root.glob(f"*/*/{CURRENT}")):
            asset, name = pointer.parent.parent.name, pointer.parent.name
            version = json.loads(pointer.read_text())["data_version"]
            folder = pointer.parent / f"v-{version[:12]}"
            partition = None if name == "_" else name
            if not (folder / MANIFEST).is_file():
                if self.remote is not None:
                    continue
                yield VerifyRow(asset, partition, version, 0, "its folder or manifest is missing")
                continue
            manifest = Manifest.from_json(json.loads((folder / MANIFEST).read_text()))
            yield VerifyRow(asset, partition, version, manifest.bytes, _difference(folder, manifest))

    # writing ------------------------------------------------------------------

    @contextmanager
    def making(self, asset: str, partition: str | None, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the only one on this machine who makes this artifact; calls ``waiting`` where another run is at it.

        Who waited should look at ``current`` again.

        Raises:
            CogumiError: the store cannot be written.
        """
        slot = self._slot(asset, partition)
        with ExitStack() as stack:
            try:
                slot.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(slot / _MAKING, waiting))
            except OSError as error:
                raise _disk_error(error, slot) from error
            yield

    @contextmanager
    def write(
        self,
        asset: str,
        partition: str | None = None,
        *,
        code_version: str = "1",
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> Iterator[Draft]:
        """Write one version: nothing is visible until the block ends without an error.

        Raises:
            CogumiError: the disk is full (what was there before stays as it was).
        """
        slot = self._slot(asset, partition)
        started = time.time()
        try:
            slot.mkdir(parents=True, exist_ok=True)
            self._sweep(slot)
            folder = slot / f"{_DRAFT}{os.getpid()}-{secrets.token_hex(4)}"
            folder.mkdir()
        except OSError as error:
            raise _disk_error(error, slot) from error
        draft = Draft(folder)
        try:
            yield draft
            config, inputs = dict(config or {}), dict(inputs or {})
            files = _hash_tree(folder)
            listing = json.dumps({name: entry.sha256 for name, entry in files.items()}, sort_keys=True)
            manifest = Manifest(
                asset=asset,
                partition=partition,
                data_version=hashlib.sha256(listing.encode()).hexdigest(),
                fingerprint=fingerprint_of(code_version, config, inputs),
                code_version=code_version,
                inputs=inputs,
                config=config,
                files=files,
                metrics=draft.metrics,
                seconds=time.time() - started,
                created=time.time(),
                profile=self.profile,
            )
            draft.ref = self._publish(slot, folder, manifest)
        except OSError as error:
            raise _disk_error(error, slot) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def annotate(self, ref: ArtifactRef, **metrics: Any) -> ArtifactRef:
        """Replace some metrics in the record of an artifact; its files and version stay as they are."""
        manifest = replace(ref.manifest, metrics={**ref.manifest.metrics, **metrics})
        text = json.dumps(asdict(manifest), indent=1, default=str)
        _write_atomically(ref.path / MANIFEST, text)
        if self.remote is not None:
            self.remote.upload(
                ref.path / MANIFEST, self._key(manifest.asset, manifest.partition, ref.path.name, MANIFEST)
            )
        return ArtifactRef(ref.path, Manifest.from_json(json.loads(text)))

    def _publish(self, slot: Path, folder: Path, manifest: Manifest) -> ArtifactRef:
        final = slot / f"v-{manifest.data_version[:12]}"
        text = json.dumps(asdict(manifest), indent=1, default=str)
        if (final / MANIFEST).is_file() and not _difference(final, manifest):
            _write_atomically(final / MANIFEST, text)  # the same bytes, made again: only the record is new
        else:
            _write_atomically(folder / MANIFEST, text)
            if final.exists():
                shutil.rmtree(final)
            os.replace(folder, final)
        if self.remote is not None:
            self._push(final, manifest)
        _write_atomically(slot / CURRENT, json.dumps({"data_version": manifest.data_version}))
        return ArtifactRef(final, Manifest.from_json(json.loads(text)))

    def _sweep(self, slot: Path) -> None:
        """Remove drafts whose writer is no longer running."""
        for stale in slot.glob(f"{_DRAFT}*"):
            pid = stale.name.removeprefix(_DRAFT).split("-")[0]
            if not pid.isdigit() or not Path(f"/proc/{pid}").exists() or int(pid) == os.getpid():
                shutil.rmtree(stale, ignore_errors=True)

    # the remote ---------------------------------------------------------------

    @staticmethod
    def _key(asset: str, partition: str | None, *parts: str) -> str:
        return "/".join((asset, partition or "_", *parts))

    def _push(self, folder: Path, manifest: Manifest) -> None:
        assert self.remote is not None
        key = (manifest.asset, manifest.partition, folder.name)
        for name in manifest.files:
            self.remote.upload(folder / name, self._key(*key, name))
        self.remote.upload(folder / MANIFEST, self._key(*key, MANIFEST))
        pointer = folder.parent / f".{CURRENT}.{os.getpid()}"
        pointer.write_text(json.dumps({"data_version": manifest.data_version}))
        self.remote.upload(pointer, self._key(manifest.asset, manifest.partition, CURRENT))
        pointer.unlink()

    def _pull_pointer(self, asset: str, partition: str | None, pointer: Path) -> None:
        assert self.remote is not None
        data = self.remote.read(self._key(asset, partition, CURRENT))
        if data is not None:
            pointer.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(pointer, data.decode())

    def _pull_version(self, asset: str, partition: str | None, folder: Path) -> None:
        """Download one version aside, verify every byte, then rename it into place."""
        assert self.remote is not None
        data = self.remote.read(self._key(asset, partition, folder.name, MANIFEST))
        if data is None:
            return
        manifest = Manifest.from_json(json.loads(data))
        aside = folder.parent / f"{_DRAFT}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            aside.mkdir(parents=True)
            for name in manifest.files:
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise CogumiError(f"{asset}: the copy in the object store is damaged: it names {name!r}")
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                self.remote.download(self._key(asset, partition, folder.name, name), aside / name)
            problem = _difference(aside, manifest)
            if problem:
                raise CogumiError(
                    f"{asset}: the copy in the object store is damaged: {problem}", "materialize it again"
                )
            (aside / MANIFEST).write_bytes(data)
            shutil.rmtree(folder, ignore_errors=True)  # what is there is not whole
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _present(folder: Path) -> ArtifactRef | None:
    """The version in ``folder``, or None where its manifest or a file is gone or of another size."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.from_json(json.loads((folder / MANIFEST).read_text()))
    intact = all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry.bytes
        for name, entry in manifest.files.items()
    )
    return ArtifactRef(folder, manifest) if intact else None


def _difference(folder: Path, manifest: Manifest) -> str:
    """What differs between a folder and its manifest; empty where nothing does."""
    found = _hash_tree(folder)
    for name, entry in manifest.files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != entry:
            return f"{name} has changed ({found[name].bytes:,} bytes, {entry.bytes:,} expected)"
    extra = sorted(set(found) - set(manifest.files))
    return f"{extra[0]} does not belong there" if extra else ""


def _disk_error(error: OSError, where: Path) -> CogumiError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(where if where.exists() else Path("/")).free
        return CogumiError(
            f"the disk below {where} is full ({free / 1e6:.0f} MB free); nothing of this step was kept",
            "free some space (cogumi verify lists sizes) and run the same command again: finished steps stay",
        )
    return CogumiError(f"cannot write below {where}: {error.strerror or error}", "check the path and its permissions")
