"""The world outside the graph, as Dagster resources: one system a module."""

import os
from pathlib import Path
from typing import Any

from cogumi_dagster.lib.profile import Profile, load_profile
from resources.artifact_store import ArtifactStoreResource
from resources.compute import ComputeResource
from resources.embeddings import EmbeddingsResource
from resources.inference import InferenceResource
from resources.settings import ProfileResource
from resources.teachers import TeachersResource

HERE = Path(__file__).resolve().parent
DEFAULT_PROFILE = "local"


def profile_path(name: str | None = None) -> Path:
    """Where a profile's file is. A path is taken as it is; else ``COGUMI_PROFILE``, else ``local``."""
    wanted = name or os.environ.get("COGUMI_PROFILE") or DEFAULT_PROFILE
    return Path(wanted).resolve() if wanted.endswith(".yaml") else HERE / "profiles" / f"{wanted}.yaml"


def read_profile(name: str | None = None) -> Profile:
    return load_profile(profile_path(name))


def build_resources(profile: str | None = None) -> dict[str, Any]:
    """All resources of one profile, by the names that assets ask for."""
    settings = ProfileResource(path=str(profile_path(profile)))
    store = ArtifactStoreResource(settings=settings)
    return {
        "settings": settings,
        "store": store,
        "compute": ComputeResource(settings=settings),
        "inference": InferenceResource(settings=settings),
        "teachers": TeachersResource(settings=settings),
        "embeddings": EmbeddingsResource(),
    }
