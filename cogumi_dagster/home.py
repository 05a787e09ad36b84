"""Where the project keeps what is not source: Dagster's history, the artifacts, the server's token."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def ensure_home() -> Path:
    """Set ``DAGSTER_HOME`` to ``.dagster_home`` in the working folder where it is not set, with our dagster.yaml.

    Dagster would otherwise keep its history in a temporary folder. A home that was named keeps its own dagster.yaml.
    """
    named = os.environ.get("DAGSTER_HOME")
    home = Path(named or Path.cwd() / ".dagster_home").resolve()
    home.mkdir(parents=True, exist_ok=True)
    source, target = ROOT / "dagster.yaml", home / "dagster.yaml"
    if source.is_file() and not (named and target.is_file()):
        shutil.copy2(source, target)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ.setdefault("COGUMI_HOME", str(Path.cwd()))
    return home
