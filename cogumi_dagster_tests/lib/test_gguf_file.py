import struct
from pathlib import Path
from typing import Any

import pytest

from cogumi_dagster.lib.gguf_file import read_gguf


def contents(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_it_reads_what_ggufs_own_reader_reads(f16_gguf: Path) -> None:
    from gguf import GGUFReader

    ours, theirs = read_gguf(f16_gguf), GGUFReader(f16_gguf)
    assert contents(ours) == contents(theirs)
    assert [(t.name, t.tensor_type, t.shape.tolist(), t.data_offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, t.tensor_type, t.shape.tolist(), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert all((a.data == b.data).all() for a, b in zip(ours.tensors, theirs.tensors, strict=True))


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3])
def test_a_file_that_was_cut_off_is_an_error(f16_gguf: Path, tmp_path: Path, share: float) -> None:
    data = f16_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises((ValueError, IndexError, struct.error)):
        read_gguf(tmp_path / "cut.gguf")
