"""How the scrub has something fetched again."""

from __future__ import annotations

from proxy.engine.pull import Pull
from proxy.engine.scrub import Refetch
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.ports import Holding, LocalFile
from proxy.rules.gates.access import OPERATOR
from proxy.rules.routes import DEFAULT_PROJECT


def refetching(pull: Pull) -> Refetch:
    """Through the read path: every rule and limit of the holding's project holds, whoever its readers are."""

    async def refetch(holding: Holding, digest: Digest, is_manifest: bool) -> None:
        project = None if holding.project == DEFAULT_PROJECT else holding.project
        path = RepositoryPath(project, holding.repository)
        if is_manifest:
            await pull.manifest(ManifestGet(path, digest, holding.host), OPERATOR)
            return
        _, opened = await pull.blob(BlobGet(path, digest, holding.host), OPERATOR)
        source = opened.source
        if isinstance(source, LocalFile):
            source.blob.close()
            return
        try:
            await source.beyond(opened.size - 1)
        finally:
            source.leave()

    return refetch
