"""Opens the object store that a URL names: `file:///absolute/path` or `azure://account/container/prefix`."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from storage.backends.local_directory import LocalDirectoryStore
from storage.backends.object_store import ObjectStore
from storage.backends.retrying import RetryingStore
from storage.errors import StoreUrlInvalid


def open_store(
    url: str, *, credentials_file: Path | None = None, executor: Executor | None = None, create: bool = False
) -> ObjectStore:
    """The store at `url`, with retries around it. Called with the event loop running; whoever opens it closes it.

    credentials_file: for azure; a connection string, an account key, or a shared access signature. Without it the usual
    Azure environment counts. executor: where a local directory's blocking calls run; the loop's own if None.
    create: makes a local directory that is missing. A container is made by its account's owner, never by Farpoint.
    Raises StoreUrlInvalid, SecretMissing, SecretUnreadable, and for a local directory StoreMissing and
    StoreNotPermitted.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreUrlInvalid(url="…", reason="what follows its slashes is no part of a URL") from error
    if parts.scheme == "azure":
        # why: the SDK takes longer to import than all the rest of a program that has a local directory
        from storage.backends.azure_address import read_address
        from storage.backends.azure_blob import AzureBlobStore

        address = read_address(url, credentials_file=credentials_file, environment=os.environ)
        return RetryingStore(AzureBlobStore(address))
    if parts.scheme != "file":
        raise StoreUrlInvalid(url=url, reason="its scheme is neither file nor azure")
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
        raise StoreUrlInvalid(url=url, reason="a local directory has three slashes and an absolute path")
    return RetryingStore(LocalDirectoryStore(Path(path), executor=executor, create=create))
