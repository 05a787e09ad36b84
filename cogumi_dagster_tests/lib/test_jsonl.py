from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.jsonl import read_jsonl, read_jsonl_tolerant, write_jsonl

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5))
def test_rows_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert read_jsonl(path) == rows


def test_a_users_broken_lines_are_counted_and_located(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 2}')
    rows, report = read_jsonl_tolerant(path)
    assert rows == [{"a": 1}, {"a": 2}]
    assert (report.rows, report.broken, report.broken_lines) == (2, 4, (3, 4, 5, 6))
    assert "4 broken line(s) left out (line 3, 4, 5, 6), 2 kept" in report.describe()


def test_a_broken_line_in_our_own_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(CogumiError, match="1 broken line"):
        read_jsonl(path)


def test_a_missing_file_is_an_error_to_read(tmp_path: Path) -> None:
    with pytest.raises(CogumiError, match="there is no file"):
        read_jsonl_tolerant(tmp_path / "none.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def failing() -> Iterator[dict[str, Any]]:
        yield {"a": 2}
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_jsonl(path, failing())
    assert read_jsonl(path) == [{"a": 1}]
