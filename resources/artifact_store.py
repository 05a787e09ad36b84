"""The artifact store as a resource: a local folder, or the same folder mirrored in S3 through dagster-aws."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from resources.settings import ProfileResource


def project_root() -> Path:
    """Where relative store paths start: ``COGUMI_HOME``, else the current folder."""
    return Path(os.environ.get("COGUMI_HOME") or Path.cwd()).resolve()


class S3Remote:
    """Objects below ``s3://bucket/prefix``, as ``lib.artifacts.Remote`` wants them."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix.strip("/")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            mend = "check store.bucket, store.endpoint_url and the credentials (AWS_ACCESS_KEY_ID, ...)"
            raise CogumiError(f"the object store s3://{self.bucket}: {error}", mend, retryable=True) from error

    def upload(self, path: Path, key: str) -> None:
        with self._explained():
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with self._explained():
            self.client.download_file(self.bucket, self._key(key), str(path))

    def read(self, key: str) -> bytes | None:
        with self._explained():
            try:
                body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            except self.client.exceptions.NoSuchKey:
                return None
            return body

    def keys(self, suffix: str) -> list[str]:
        start = len(self._key(""))
        with self._explained():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(""))
            found = [item["Key"][start:] for page in pages for item in page.get("Contents", ())]
        return [key for key in found if key.endswith(suffix)]


class ArtifactStoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Versioned, content-addressed artifacts, where the profile says."""

    settings: ProfileResource

    def open(self) -> ArtifactStore:
        profile = self.settings.profile
        root = project_root() / profile.store.path.format(profile=profile.name)
        remote = None
        if profile.store.kind == "s3":
            from dagster_aws.s3 import S3Resource

            s3 = S3Resource(endpoint_url=profile.store.endpoint_url, region_name=profile.store.region)
            remote = S3Remote(s3.get_client(), str(profile.store.bucket), profile.store.prefix)
        return ArtifactStore(root, remote=remote, profile=profile.name)
