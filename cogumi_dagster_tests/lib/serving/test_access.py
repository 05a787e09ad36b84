"""Where the server's token comes from, and who can read it."""

import os
from pathlib import Path

import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.access import find_token


def test_the_token_comes_from_the_argument_then_the_environment_then_a_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "deep" / "token"
    monkeypatch.setenv("COGUMI_TOKEN", "from-the-environment")
    assert find_token("from-the-argument", file).value == "from-the-argument"
    assert find_token(None, file).value == "from-the-environment"
    assert not file.exists()
    monkeypatch.delenv("COGUMI_TOKEN")
    made = find_token(None, file)
    assert len(made.value) >= 43 and str(file) in made.origin
    assert file.stat().st_mode & 0o777 == 0o600
    assert find_token(None, file).value == made.value
    assert made.value not in repr(made)


def test_a_token_file_that_others_can_read_is_closed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("COGUMI_TOKEN", raising=False)
    file = tmp_path / "token"
    file.write_text("kept-from-before\n")
    os.chmod(file, 0o644)
    assert find_token(None, file).value == "kept-from-before"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("bad", ["", "short", "with spaces in it", "ünïcödë-token", "x" * 600, "line\nbreak-in-it"])
def test_a_token_that_no_header_can_carry_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(CogumiError, match="visible ASCII"):
        find_token(bad, tmp_path / "token")
