import hashlib
import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import zstandard
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.compression import package as module
from cogumi_dagster.lib.compression.package import CHUNK, PLAIN, file_layout, pack, unpack, zstd_ratio
from cogumi_dagster.lib.errors import CogumiError

TYPES = ("Q8_0", "Q5_1", "Q4_K", "Q6_K", "F16", "IQ2_XXS")


def write_model(path: Path, rows: int = 64, types: tuple[str, ...] = TYPES, **metadata: str) -> Path:
    """A GGUF of random blocks, 512 weights a row, with a norm between the tensors and some text before them."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{n}" for n in range(300)])
    for name, value in metadata.items():
        writer.add_string(name, value)
    for kind in types:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        data = draw.integers(0, 256, (rows, 512 // weights * size), np.uint8)
        writer.add_tensor(f"{kind}.weight", data, raw_dtype=GGMLQuantizationType[kind])
        writer.add_tensor(f"{kind}.norm", draw.normal(1, 0.1, 100).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(write_model(tmp_path / "model.bin"), tmp_path / "package", level=3, dictionary_kb=8)
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
    unpack(folder / "out", folder / "again")
    assert (folder / "again").read_bytes() == data * times


def test_the_report_and_the_manifest_say_what_was_written(tmp_path: Path) -> None:
    source = tmp_path / "model.bin"
    source.write_bytes(bytes(range(256)) * 40_000 + b"end")
    report = pack(source, tmp_path / "package", level=3, dictionary_kb=8)
    manifest = json.loads((tmp_path / "package" / "package.json").read_text())
    assert manifest["format"] == 2 and len(manifest["chunks"]) == 3 and manifest["bytes"] == 256 * 40_000 + 3
    assert report.bytes_after == sum(path.stat().st_size for path in (tmp_path / "package").iterdir())
    assert report.ratio == report.bytes_after / report.bytes_before < 0.01
    source.write_bytes(random.Random(0).randbytes(20_000))
    report = pack(source, tmp_path / "package", level=3, dictionary_kb=8)
    assert (report.dictionary_bytes, report.dictionary_saves < 0) == (0, True), "nothing to learn: it is left out"
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == ["model.bin.zst", "package.json"]


def test_a_dictionary_that_pays_is_kept_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that repeat each other but not themselves: only a dictionary can tell."""
    monkeypatch.setattr(module, "CHUNK", 4096)
    source = tmp_path / "model.bin"
    source.write_bytes(random.Random(0).randbytes(4096) * 60)
    report = pack(source, tmp_path / "package", level=3, dictionary_kb=8)
    assert report.bit_identical and report.dictionary_saves > 30 * 4096
    assert report.dictionary_bytes == (tmp_path / "package" / "dictionary.zstd").stat().st_size
    (tmp_path / "package" / "dictionary.zstd").unlink()
    with pytest.raises(CogumiError, match=r"dictionary\.zstd is not what"):
        unpack(tmp_path / "package", tmp_path / "out")
    source.write_bytes(random.Random(0).randbytes(4096) * 2)
    pack(source, tmp_path / "package", level=3, dictionary_kb=8)
    assert not (tmp_path / "package" / "dictionary.zstd").exists(), "nothing of an older package stays"


def test_tensors_become_planes_and_all_else_stays(tmp_path: Path) -> None:
    runs = file_layout(write_model(tmp_path / "model.gguf"))
    assert [run.kind for run in runs] == [
        PLAIN,
        "Q8_0",
        PLAIN,
        "Q5_1",
        PLAIN,
        "Q4_K",
        PLAIN,
        "Q6_K",
        PLAIN,
        "F16",
        PLAIN,
    ]
    assert [run.start for run in runs[1:]] == [run.start + run.bytes for run in runs[:-1]]
    assert runs[-1].start + runs[-1].bytes == (tmp_path / "model.gguf").stat().st_size


def test_chunks_hold_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1000)
    model = write_model(tmp_path / "model.gguf")
    assert {run.bytes for run in file_layout(model) if run.kind == "Q6_K"} == {840, 64 * 2 * 210 % 840 or 840}
    assert pack(model, tmp_path / "package", level=1, dictionary_kb=1).bit_identical


@pytest.mark.parametrize("damage", ["overlap", "cut off", "no tensors", "not sound"])
def test_a_gguf_that_is_not_sound_is_packed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    model = write_model(tmp_path / "model.gguf")
    size = model.stat().st_size
    if damage == "overlap":
        tensors = [module.Run("Q8_0", 0, 3400), module.Run("Q8_0", 340, 3400)]
        monkeypatch.setattr(module, "_tensors", lambda source: tensors)
    elif damage == "cut off":
        monkeypatch.setattr(module, "_tensors", lambda source: [module.Run("Q8_0", 0, 34 * size)])
    elif damage == "no tensors":
        model.write_bytes(model.read_bytes()[:200])
    else:
        model.write_bytes(b"GGUF" + random.Random(0).randbytes(5000))
    assert file_layout(model) == [module.Run(PLAIN, 0, model.stat().st_size)]
    assert pack(model, tmp_path / "package", level=1, dictionary_kb=1).bit_identical


def test_planes_beat_zstd_on_pruned_weights_with_a_minimum(tmp_path: Path) -> None:
    """Half of the weights are zero, and in Q5_1 zero has another code in each block."""
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.02, (256, 512)).astype(np.float32)
    values[draw.random(values.shape) < 0.5] = 0.0
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    kind = GGMLQuantizationType.Q5_1
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = pack(tmp_path / "model.gguf", tmp_path / "package", level=10, dictionary_kb=8)
    assert report.bit_identical
    assert report.ratio < 0.75 < 0.9 < report.ratio_zstd == zstd_ratio(tmp_path / "model.gguf", 10)


def test_a_thorough_level_keeps_the_shorter_frame(tmp_path: Path) -> None:
    """Words of four codes: zstd proper finds what the planes' coder does not look for."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    draw = np.random.default_rng(0)
    words = draw.integers(0, 256, (64, 4), np.uint8)
    blocks = np.concatenate([np.ones((4096, 2), np.uint8), words[draw.integers(0, 64, (4096, 8))].reshape(-1, 32)], 1)
    writer.add_tensor("w", blocks.reshape(256, -1), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fast, thorough = (
        pack(tmp_path / "model.gguf", tmp_path / str(level), level=level, dictionary_kb=8) for level in (10, 19)
    )
    assert fast.bit_identical and thorough.bit_identical
    assert thorough.ratio < 0.5 * fast.ratio


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK", "CHUNK_1"):
        monkeypatch.setattr(module, name, 1 << 15)
    monkeypatch.setattr(module, "MOST_THREADS", 2)
    model = write_model(tmp_path / "model.gguf", rows=4096, types=("Q8_0", "Q5_1", "F16"))
    assert model.stat().st_size > 8_000_000
    tracemalloc.start()
    pack(model, tmp_path / "package", level=1, dictionary_kb=1)
    packing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    unpack(tmp_path / "package", tmp_path / "out")
    unpacking = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(packing, unpacking) < 4_000_000


def format_1(source: Path, out: Path) -> Path:
    """A package as the first version wrote it: a dictionary, and a frame with a checksum for each MiB."""
    data = source.read_bytes()
    dictionary = zstandard.ZstdCompressionDict(data[:5000], dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(level=3, dict_data=dictionary, write_checksum=True)
    frames = [compressor.compress(data[at : at + (1 << 20)]) for at in range(0, len(data), 1 << 20)]
    out.mkdir()
    (out / "dictionary.zstd").write_bytes(dictionary.as_bytes())
    (out / f"{source.name}.zst").write_bytes(b"".join(frames))
    manifest = {
        "file": source.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "chunk": 1 << 20,
        "frames": [len(frame) for frame in frames],
        "dictionary_sha256": hashlib.sha256(dictionary.as_bytes()).hexdigest(),
    }  # fmt: skip
    (out / "package.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return out


def test_a_package_of_format_1_still_unpacks(tmp_path: Path) -> None:
    """Its first frame is longer than its chunk, which holds nothing that zstd could shrink."""
    source = tmp_path / "model.bin"
    source.write_bytes(random.Random(0).randbytes(1 << 20) + b"".join(b"weight %d;" % n for n in range(100_000)))
    old = format_1(source, tmp_path / "old")
    unpack(old, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == source.read_bytes()
    for changes in ({"bytes": 10**30}, {"bytes": 10}, {"frames": []}):
        shutil.copytree(old, tmp_path / "bad")
        edit(tmp_path / "bad", **changes)
        with pytest.raises(CogumiError, match="is not a package"):
            unpack(tmp_path / "bad", tmp_path / "out")
        shutil.rmtree(tmp_path / "bad")


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


def replace_frames(package: Path, frame: bytes, size: int) -> None:
    (package / "model.bin.zst").write_bytes(frame)
    edit(package, bytes=size, chunks=[[PLAIN, size, [len(frame)]]])


def bomb(package: Path) -> None:
    """A frame that says it holds 256 MiB of zeros, in a few kilobytes."""
    replace_frames(package, zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28)), CHUNK)


def silent_bomb(package: Path) -> None:
    """A frame without its size, which decompresses to more than the manifest declares."""
    replace_frames(package, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24)), CHUNK)


def many_zeros(package: Path) -> None:
    """Honest frames and sizes of 2 TB of zeros."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(CHUNK))
    (package / "model.bin.zst").write_bytes(frame * 500)
    edit(package, bytes=500 * CHUNK, chunks=[[PLAIN, CHUNK, [len(frame)]]] * 500)


def huge(package: Path) -> None:
    edit(package, chunks=[[PLAIN, 1 << 60, [5]]], bytes=1 << 60)


def edit_first(package: Path, **changes: Any) -> None:
    chunks = json.loads((package / "package.json").read_text())["chunks"]
    first = {"kind": chunks[0][0], "bytes": chunks[0][1], "frames": chunks[0][2], **changes}
    edit(package, chunks=[list(first.values()), *chunks[1:]])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        bomb,
        silent_bomb,
        many_zeros,
        huge,
        lambda package: (package / "model.bin.zst").unlink(),
        lambda package: (package / "package.json").unlink(),
        lambda package: (package / "package.json").write_text("{"),
        lambda package: (package / "package.json").write_text("[]"),
        lambda package: (package / "package.json").write_text("[" * 100_000),
        lambda package: (package / "package.json").write_bytes(b"\xff\xfe"),
        lambda package: edit(package, format=3),
        lambda package: edit(package, format="two"),
        lambda package: edit(package, format=None),
        lambda package: edit(package, file="../model.bin"),
        lambda package: edit(package, file="/etc/passwd"),
        lambda package: edit(package, file="a/../../model.bin"),
        lambda package: edit(package, file="x" * 5000),
        lambda package: edit(package, file="a\0b"),
        lambda package: edit(package, bytes=10),
        lambda package: edit(package, bytes=-1),
        lambda package: edit(package, chunks=[]),
        lambda package: edit(package, chunks=[[PLAIN, 1]]),
        lambda package: edit(package, chunks=[["many"]]),
        lambda package: edit_first(package, kind="Q9_9"),
        lambda package: edit_first(package, kind="Q8_0"),
        lambda package: edit_first(package, frames=[]),
        lambda package: edit_first(package, frames=[0]),
        lambda package: edit_first(package, frames=[True]),
        lambda package: edit_first(package, frames=[1e3]),
        lambda package: edit_first(package, frames=[1 << 70]),
        lambda package: edit(package, sha256="0" * 64),
        lambda package: edit(package, sha256="x"),
        lambda package: edit(package, sha256=None),
        lambda package: edit(package, dictionary_sha256="0" * 64),
    ],
)
def test_a_damaged_package_is_refused_and_leaves_nothing(
    packed: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(packed)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CogumiError, match=r"is damaged|is not a package|of format 3|no model does"):
        unpack(packed, out / "model.bin")
    assert list(out.iterdir()) == []


def test_what_does_not_fit_on_the_disk_is_not_begun(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = (tmp_path / "model.bin").stat().st_size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(CogumiError, match=f"has {free:,} free"):
        unpack(packed, tmp_path / "out")


def test_damage_anywhere_is_found_or_harmless(packed: Path, tmp_path: Path) -> None:
    """Bytes flipped, cut off, doubled or zeroed at random, in every file: refused, or the same bytes come out."""
    draw = random.Random(0)
    whole = (tmp_path / "model.bin").read_bytes()
    members = {path: path.read_bytes() for path in sorted(packed.iterdir())}
    refused = 0
    for _ in range(200):
        path, data = draw.choice(list(members.items()))
        at, broken = draw.randrange(len(data)), bytearray(data)
        match draw.randrange(4):
            case 0:
                broken[at] ^= 1 << draw.randrange(8)
            case 1:
                del broken[at:]
            case 2:
                broken[at:at] = broken[at : at + draw.randrange(1, 50)]
            case 3:
                broken[at : at + 20] = bytes(len(broken[at : at + 20]))
        path.write_bytes(broken)
        try:
            unpack(packed, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == whole
            (tmp_path / "out").unlink()
        except CogumiError:
            refused += 1
            assert not (tmp_path / "out").exists()
        path.write_bytes(data)
    assert refused > 120
    assert not list(tmp_path.glob("*.part"))


def test_a_failed_unpacking_keeps_the_old_file(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    flip(packed)
    with pytest.raises(CogumiError):
        unpack(packed, tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
