import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.compression import package as module
from cogumi_dagster.lib.compression.package import CHUNK, pack, unpack
from cogumi_dagster.lib.errors import CogumiError


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    source = tmp_path / "model.bin"
    source.write_bytes(b"".join(b"weight %d;" % (n % 977) for n in range(20_000)))
    pack(source, tmp_path / "package", level=3, dictionary_kb=8)
    return tmp_path / "package"


def edit(package: Path, **changes: Any) -> None:
    path = package / "package.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=5000), times=st.integers(1, 60), chunk=st.sampled_from([64, 1000, CHUNK]))
def test_any_bytes_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, data: bytes, times: int, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    folder = tmp_path_factory.mktemp("package")
    source = folder / "model.bin"
    source.write_bytes(data * times)
    report = pack(source, folder / "out", level=1, dictionary_kb=1)
    assert report.bit_identical
    assert report.bytes_before == len(data) * times
    assert report.bytes_after == (folder / "out" / "model.bin.zst").stat().st_size
    unpack(folder / "out", folder / "again")
    assert (folder / "again").read_bytes() == data * times


def test_the_report_and_the_manifest_say_what_was_written(tmp_path: Path) -> None:
    source = tmp_path / "model.bin"
    source.write_bytes(bytes(range(256)) * 8192 + b"end")
    report = pack(source, tmp_path / "package", level=3, dictionary_kb=8, extra={"note": "x"})
    manifest = json.loads((tmp_path / "package" / "package.json").read_text())
    assert manifest["note"] == "x" and len(manifest["frames"]) == 3 and manifest["bytes"] == 2 * CHUNK + 3
    assert report.ratio == report.bytes_after / report.bytes_before < 0.01
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == [
        "dictionary.zstd", "model.bin.zst", "package.json",
    ]  # fmt: skip


def test_an_empty_file_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CogumiError, match="is empty"):
        pack(tmp_path / "empty", tmp_path / "package", level=3, dictionary_kb=8)


def truncate(package: Path) -> None:
    path = package / "model.bin.zst"
    path.write_bytes(path.read_bytes()[:-5])


def flip(package: Path) -> None:
    path = package / "model.bin.zst"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_dictionary(package: Path) -> None:
    path = package / "dictionary.zstd"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def bomb(package: Path) -> None:
    """A frame that says it holds 256 MiB of zeros, in a few kilobytes."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    (package / "model.bin.zst").write_bytes(frame)
    edit(package, frames=[len(frame)])


def silent_bomb(package: Path) -> None:
    """A frame without its size, which decompresses to more than the manifest declares."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    (package / "model.bin.zst").write_bytes(frame)
    edit(package, frames=[len(frame)])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        flip_dictionary,
        bomb,
        silent_bomb,
        lambda package: (package / "model.bin.zst").unlink(),
        lambda package: (package / "dictionary.zstd").unlink(),
        lambda package: (package / "package.json").write_text("{"),
        lambda package: (package / "package.json").write_text("[]"),
        lambda package: edit(package, file="../model.bin"),
        lambda package: edit(package, file="/etc/passwd"),
        lambda package: edit(package, file="a/../../model.bin"),
        lambda package: edit(package, bytes=10),
        lambda package: edit(package, bytes=-1),
        lambda package: edit(package, frames=[]),
        lambda package: edit(package, frames=["many"]),
        lambda package: edit(package, sha256="0" * 64),
        lambda package: edit(package, sha256=None),
        lambda package: edit(package, dictionary_sha256=None),
    ],
)
def test_a_damaged_package_is_refused_and_leaves_nothing(
    packed: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(packed)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CogumiError, match=r"is damaged|is not a package"):
        unpack(packed, out / "model.bin")
    assert list(out.iterdir()) == []


def test_a_failed_unpacking_keeps_the_old_file(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    flip(packed)
    with pytest.raises(CogumiError):
        unpack(packed, tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
