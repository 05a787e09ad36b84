"""llama.cpp engines over the profile's slots and threads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cogumi_dagster.lib.inference.llama import LlamaEngine
from resources.settings import ProfileResource

ANSWERS_FILE = "answers.jsonl"


class InferenceResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Starts the engine that evaluates, teaches and serves."""

    settings: ProfileResource

    @contextmanager
    def engine(
        self, gguf: Path, adapters: Mapping[str, Path] | None = None, kept: Path | None = None
    ) -> Iterator[LlamaEngine]:
        """``kept``: a step's scratch folder, in which its answers survive a kill."""
        profile = self.settings.profile
        engine = LlamaEngine(
            gguf,
            adapters,
            slots=profile.serving.slots,
            context=profile.serving.context,
            threads=profile.compute.threads,
            max_answer_tokens=profile.serving.max_answer_tokens,
            kept=kept / ANSWERS_FILE if kept else None,
            gpu_layers=0 if profile.compute.device == "cpu" else 999,
        )
        try:
            yield engine
        finally:
            engine.close()
