"""The profile as a resource."""

from functools import lru_cache
from pathlib import Path

import dagster as dg
from pydantic import Field

from cogumi_dagster.lib.profile import Profile, beside, load_profile


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

    @property
    def sources(self) -> Path:
        return beside(Path(self.path), self.profile.dataset.sources)

    @property
    def catalogue(self) -> Path:
        return beside(Path(self.path), self.profile.teaching.catalogue)
