"""The world outside the graph, as Dagster resources: one system a module."""

from typing import Any

from cogumi_dagster.lib.profile import profile_path, read_profile
from resources.artifact_store import ArtifactStoreResource
from resources.compute import ComputeResource
from resources.embeddings import EmbeddingsResource
from resources.inference import InferenceResource
from resources.settings import ProfileResource
from resources.teachers import TeachersResource

__all__ = ["build_resources", "profile_path", "read_profile"]


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
