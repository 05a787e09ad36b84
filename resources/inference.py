"""llama.cpp engines over the profile's slots and threads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cogumi_dagster.lib.inference.llama import LlamaEngine
from cogumi_dagster.lib.serving.contract import refuse_other_base
from resources.settings import ProfileResource


class InferenceResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Starts the engine that evaluates, teaches and serves."""

    settings: ProfileResource

    @contextmanager
    def engine(
        self,
        gguf: Path,
        adapters: Mapping[str, Path] | None = None,
        kept: Path | None = None,
        made_for: Path | None = None,
    ) -> Iterator[LlamaEngine]:
        """``kept``: the folder in which answers survive a kill, of this step and of others that ask the same.
        ``made_for``: the file that the adapters were trained on, where ``gguf`` is another form of its weights.

        Raises:
            CogumiError: an adapter was trained on another base; what ``LlamaEngine`` raises.
        """
        for name, path in (adapters or {}).items():
            refuse_other_base(name, path, made_for or gguf)
        profile = self.settings.profile
        engine = LlamaEngine(
            gguf,
            adapters,
            slots=profile.serving.slots,
            context=profile.serving.context,
            threads=profile.compute.threads,
            least_answer_tokens=profile.taught_tokens,
            max_answer_tokens=profile.serving.max_answer_tokens,
            kept=kept,
            gpu_layers=0 if profile.compute.device == "cpu" else None,
        )
        try:
            yield engine
        finally:
            engine.close()
