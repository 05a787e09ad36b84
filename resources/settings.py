"""The profile as a resource."""

from functools import lru_cache
from pathlib import Path

import dagster as dg
from pydantic import Field

from cogumi_dagster.lib.profile import Profile, load_profile


@lru_cache(maxsize=8)
def _cached(path: str, changed: float) -> Profile:
    return load_profile(Path(path))


class ProfileResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """One environment: everything that differs between a laptop and a cluster."""

    path: str = Field(description="the profile's YAML file")

    @property
    def profile(self) -> Profile:
        file = Path(self.path)
        return _cached(self.path, file.stat().st_mtime if file.is_file() else 0.0)

    def beside(self, name: str) -> Path:
        """A file that a profile names relative to ``resources/`` (or to itself), such as the catalogue."""
        local = Path(self.path).parent / name
        return local if local.exists() else Path(__file__).resolve().parent / name

    @property
    def sources(self) -> Path:
        return self.beside(self.profile.dataset.sources)

    @property
    def catalogue(self) -> Path:
        return self.beside(self.profile.teaching.catalogue)
