"""The serving bundle: one folder with a manifest, all that the server needs, refused when anything in it is off.

``manifest.json``, ``base.gguf``, ``adapters/*.gguf``, ``router/``, ``escalation.npz``, ``tokenizer/``.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.answering import SERVED_TOKENS, Assistant
from cogumi_dagster.lib.serving.contract import (
    TOKENIZER_FILE,
    Contract,
    Sha256,
    adapter_contract,
    contract_of,
    refuse_mismatch,
    refuse_other_families,
    sha256_of,
    template_of,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BASE = "base.gguf"
ESCALATION = "escalation.npz"
VERSIONED_PACKAGES = ("cogumi", "xllamacpp", "gguf", "numpy", "scikit-learn")
MAX_MANIFEST_BYTES = 4_000_000
BLOCK = 1 << 20
REBUILD = "materialize serving_bundle again, or copy the bundle again from where it was written"

AdapterName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class Manifest(_Strict):
    """``manifest.json``. ``contract`` is the base's; ``card`` names the profile and the artifacts it was made from."""

    format: Literal[1]
    contract: Contract
    adapters: dict[AdapterName, Contract]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    card: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened. ``version`` is the SHA-256 of its manifest, and so of everything in it."""

    path: Path
    version: str
    manifest: Manifest

    @property
    def base_gguf(self) -> Path:
        return self.path / BASE

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self.path / _adapter_file(name) for name in self.manifest.adapters}

    @property
    def router_dir(self) -> Path:
        return self.path / "router"

    @property
    def escalation(self) -> Path:
        return self.path / ESCALATION

    @property
    def answer_tokens(self) -> int:
        """Room for an answer where a request names none."""
        return int(self.manifest.card.get("answer_tokens", SERVED_TOKENS))


@dataclass(frozen=True)
class BundleReport:
    """What was written. ``bytes`` is the sum of the files, without the manifest."""

    path: str
    version: str
    files: int
    bytes: int
    base_bytes: int
    adapter_bytes: dict[str, int]
    gate_not_passed: tuple[str, ...] = ()
    """Modifiers that are in it although their evaluation did not open their gate."""


def write_bundle(
    out: Path,
    *,
    base_gguf: Path,
    adapters: Mapping[str, Path],
    contracts: Mapping[str, Mapping[str, Any]],
    router_dir: Path,
    escalation: Path,
    tokenizer_files: Mapping[str, Path],
    card: Mapping[str, Any],
) -> BundleReport:
    """Write a bundle to ``out``, which must not exist or be empty. A killed run leaves no bundle.

    Args:
        contracts: of each adapter, the three hashes of ``Contract`` (other keys are left out). An adapter without
            one must carry it in its GGUF metadata; where both exist they must agree.
        tokenizer_files: by name; ``tokenizer.json`` at least, and ``chat_template.jinja`` or ``tokenizer_config.json``.
        card: JSON with at least ``profile`` and ``artifacts`` (name -> version) that the bundle was made from.

    Raises:
        CogumiError: a source is missing, an adapter has no contract or one for another base, ``out`` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CogumiError(f"{out} exists already", "give a new folder; a bundle is never written over")
    if missing := {"profile", "artifacts"} - card.keys():
        raise CogumiError(f"the bundle's card lacks {', '.join(sorted(missing))}", "name the profile and the artifacts")
    sources = _sources(base_gguf, adapters, router_dir, escalation, tokenizer_files)
    contract = contract_of(base_gguf, tokenizer_files)
    promised = {name: adapter_contract(name, path, contracts.get(name)) for name, path in adapters.items()}
    for name, other in promised.items():
        refuse_mismatch(name, other, contract)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        files = {name: _copy(source, temporary / name) for name, source in sorted(sources.items())}
        content = Manifest(
            format=1, contract=contract, adapters=promised, files=files, versions=_versions(), card=dict(card)
        )
        text = json.dumps(content.model_dump(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        _write_synced(temporary / MANIFEST, text.encode())
        bundle = open_bundle(temporary, verify=False)
        os.replace(temporary, out)
    except (TypeError, ValueError, ValidationError) as error:
        raise CogumiError(
            f"the bundle's manifest cannot be written: {error}", "give plain names and a JSON card"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    adapter_bytes = {name: files[_adapter_file(name)].bytes for name in adapters}
    total = sum(entry.bytes for entry in files.values())
    return BundleReport(str(out), bundle.version, len(files), total, files[BASE].bytes, adapter_bytes)


def open_bundle(path: Path, verify: bool = True) -> Bundle:
    """Open a bundle and refuse it when anything is off. ``verify`` re-hashes every file.

    Raises:
        CogumiError: no manifest or a broken one; a file missing, added, changed or linked; a path that leads out;
            a modifier made for another base, tokenizer or chat template.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file() or (path / MANIFEST).is_symlink():
        raise CogumiError(
            f"{path} is not a bundle: it has no {MANIFEST}", "materialize serving_bundle, or check the path"
        )
    manifest, digest = _read_manifest(path / MANIFEST)
    found = _walk(path)
    _refuse_other_names(path, set(manifest.files), set(found) - {MANIFEST})
    for name, entry in manifest.files.items():
        size = found[name].stat().st_size
        if size != entry.bytes:
            raise CogumiError(f"{name} in {path} is {size} bytes, the manifest says {entry.bytes}", REBUILD)
        if verify and sha256_of(found[name]) != entry.sha256:
            raise CogumiError(f"{name} in {path} was changed: its SHA-256 is not the manifest's", REBUILD)
    _check_contracts(path, manifest)
    return Bundle(path, digest, manifest)


def load_assistant(bundle: Bundle, *, slots: int, context: int, threads: int | None) -> Assistant:
    """Load the engine, the router and the escalation detector of a bundle. The caller closes the assistant."""
    from cogumi_dagster.lib.inference.llama import LlamaEngine
    from cogumi_dagster.lib.routing.escalation import EscalationDetector
    from cogumi_dagster.lib.routing.router import Router

    router = Router.load(bundle.router_dir)
    escalation = EscalationDetector.load(bundle.escalation)
    engine = LlamaEngine(bundle.base_gguf, bundle.adapters, slots=slots, context=context, threads=threads)
    return Assistant(engine, router, escalation, bundle.answer_tokens)


def _adapter_file(name: str) -> str:
    return f"adapters/{name}.gguf"


def _sources(
    base_gguf: Path, adapters: Mapping[str, Path], router_dir: Path, escalation: Path, tokenizer: Mapping[str, Path]
) -> dict[str, Path]:
    """What is copied, by its path in the bundle."""
    sources = {BASE: base_gguf, ESCALATION: escalation}
    sources |= {_adapter_file(name): path for name, path in adapters.items()}
    sources |= {f"tokenizer/{name}": path for name, path in tokenizer.items()}
    routing = {f"router/{p.relative_to(router_dir).as_posix()}": p for p in router_dir.rglob("*") if p.is_file()}
    if not routing:
        raise CogumiError(f"there is no router in {router_dir}", "materialize router_model")
    for name, source in (sources | routing).items():
        if not source.is_file():
            raise CogumiError(
                f"the bundle's {name} cannot be copied: there is no file {source}", "materialize it first"
            )
        if not _is_plain(name):
            raise CogumiError(f"{name!r} cannot be a file's name in a bundle", "use letters, digits, dots and dashes")
    return sources | routing


def _is_plain(name: str) -> bool:
    """Whether a manifest's path stays inside the bundle and is written in one way only."""
    pure = PurePosixPath(name)
    return (
        bool(name) and not pure.is_absolute() and pure.as_posix() == name and ".." not in pure.parts
        and "\\" not in name and "\0" not in name and ":" not in name
    )  # fmt: skip


def _copy(source: Path, target: Path) -> FileEntry:
    """Copy and hash in one pass, to the disk and not only to its cache."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as data, target.open("xb") as out:
        while block := data.read(BLOCK):
            digest.update(block)
            size += out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest and its SHA-256."""
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CogumiError(f"{path} is too large for a manifest", REBUILD)
    data = path.read_bytes()
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        at = error.errors()[0]
        where = ".".join(str(part)[:80] for part in at["loc"])
        raise CogumiError(f"{path} is not a bundle's manifest: {where} {at['msg'][:200]}".strip(), REBUILD) from None
    if (odd := next((name for name in manifest.files if not _is_plain(name)), None)) is not None:
        raise CogumiError(f"{path} names a file outside the bundle: {odd[:80]!r}", "do not use this bundle")
    return manifest, hashlib.sha256(data).hexdigest()


def _walk(path: Path) -> dict[str, Path]:
    """Every file under ``path`` by its name in the manifest. Links, even good ones, are refused."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            entry = Path(folder) / name
            relative = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise CogumiError(f"{relative} in {path} is a link or no plain file", "copy the bundle with its files")
            if entry.is_file():
                found[relative] = entry
    return found


def _refuse_other_names(path: Path, listed: set[str], found: set[str]) -> None:
    if missing := sorted(listed - found):
        raise CogumiError(f"{missing[0]} is missing from {path}", REBUILD)
    if extra := sorted(found - listed):
        raise CogumiError(f"{extra[0]} in {path} is not in its manifest", f"remove it, or {REBUILD}")


def _check_contracts(path: Path, manifest: Manifest) -> None:
    """The base's contract is that of the files, and every modifier's is the base's."""
    needed = [BASE, ESCALATION, f"tokenizer/{TOKENIZER_FILE}", *map(_adapter_file, manifest.adapters)]
    if absent := next((name for name in needed if name not in manifest.files), None):
        raise CogumiError(f"the manifest of {path} does not list {absent}", REBUILD)
    tokenizer = {Path(name).name: path / name for name in manifest.files if name.startswith("tokenizer/")}
    template = template_of(tokenizer)
    actual = {
        "base_sha256": manifest.files[BASE].sha256,
        "tokenizer_sha256": manifest.files[f"tokenizer/{TOKENIZER_FILE}"].sha256,
        "template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
    }
    for key, value in actual.items():
        if value is not None and value != getattr(manifest.contract, key):
            raise CogumiError(f"the {key} of {path}'s contract is not that of its files", REBUILD)
    for name, stated in manifest.adapters.items():
        carried = adapter_contract(name, path / _adapter_file(name), stated.model_dump())
        refuse_mismatch(name, carried, manifest.contract)
        refuse_other_families(name, path / _adapter_file(name))
