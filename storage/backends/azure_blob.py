"""An Azure Blob container, or a prefix in it, as an object store: one block blob per object.

Invariants: a blob is made by one conditional request (If-None-Match: *), so it is created whole and never replaced;
every error of the SDK leaves here as a StoreFault; a create that may have reached the service without its answer
reaching us is StoreOutcomeUnknown, never "not created". Nothing below repeats a request: `RetryingStore` decides.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import aiohttp
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
)
from azure.identity.aio import DefaultAzureCredential
from azure.storage.blob import BlobProperties
from azure.storage.blob.aio import BlobClient, ContainerClient
from typing_extensions import Buffer

from storage.backends.azure_address import AzureAddress
from storage.backends.azure_transport import asked_once, make_transport
from storage.backends.object_store import ObjectInfo, check_object_name, clamp_range
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    StoreCredentialRefused,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreOutcomeUnknown,
    StoreUnavailable,
)

CONNECT_SECONDS_MAX: Final = 10
SILENCE_SECONDS_MAX: Final = 60
"""How long the service may say nothing while an answer is due, or take nothing of a request."""

SINGLE_REQUEST_BYTES_MAX: Final = 256 * 2**20
"""Larger objects are staged in blocks of BLOCK_BYTES and committed by one conditional request."""

BLOCK_BYTES: Final = 16 * 2**20

REASON_LENGTH_MAX: Final = 200

RETRY_AFTER_SECONDS_MAX: Final = 60.0
"""Of what a busy service asks for, so much is believed."""

_STATUS_REFUSED_UNDONE: Final = {429}
_CODES_REFUSED_UNDONE: Final = {"ServerBusy"}
"""With these the service says that it has not begun the operation; after any other server error nobody knows."""

_CODES_STORE_MISSING: Final = {"ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled", "ResourceNotFound"}
_CODES_EXISTS: Final = {"BlobAlreadyExists", "ConditionNotMet", "BlobImmutableDueToPolicy", "UnauthorizedBlobOverwrite"}
_CODES_CREDENTIAL_REFUSED: Final = {
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
    "KeyBasedAuthenticationNotPermitted",
    "NoAuthenticationInformation",
}


class AzureBlobStore:
    """An `ObjectStore` in a container that exists."""

    def __init__(self, address: AzureAddress) -> None:
        """Connects to nothing: a missing container shows at the first call. Needs a running event loop."""
        self._prefix = address.prefix
        self.url = address.url
        self._address = address
        self._identity = DefaultAzureCredential() if address.credential is None else None
        self._container = ContainerClient(
            address.endpoint,
            address.container,
            credential=address.credential or self._identity,
            retry_total=0,
            transport=make_transport(connect_seconds_max=CONNECT_SECONDS_MAX, silence_seconds_max=SILENCE_SECONDS_MAX),
            max_single_put_size=SINGLE_REQUEST_BYTES_MAX,
            max_single_get_size=SINGLE_REQUEST_BYTES_MAX,
            max_block_size=BLOCK_BYTES,
        )

    async def create(self, name: str, parts: Sequence[Buffer]) -> None:
        blob = self._blob(name)
        # why: the SDK takes a single request's body as one bytes object only, so the parts are joined once
        body = b"".join(parts)
        try:
            with self._faults(name, is_create=True):
                await blob.upload_blob(body, length=len(body), overwrite=False)
        except StoreNotPermitted as refusal:
            # why: who may create and not overwrite is refused as such when the name is taken
            if not isinstance(refusal, StoreCredentialRefused):
                await self._raise_if_there(name, refusal)
            raise

    async def read(self, name: str, *, first_byte: int = 0, end_byte: int | None = None) -> bytes:
        blob = self._blob(name)
        if first_byte < 0:
            # why: the service has no ranges counted from the end; an object never changes, so asking twice is safe
            first_byte, end_byte = clamp_range((await self.info(name)).size_bytes, first_byte, end_byte)
        if end_byte is not None and end_byte <= first_byte:
            await self.info(name)
            return b""
        with self._faults(name):
            try:
                length = None if end_byte is None else end_byte - first_byte
                download = await blob.download_blob(offset=first_byte, length=length, raw_request_hook=asked_once())
                data: bytes = await download.readall()
            except HttpResponseError as error:
                if error.status_code == 416:  # the range begins at or behind the end
                    return b""
                raise
        return data

    async def info(self, name: str) -> ObjectInfo:
        blob = self._blob(name)
        with self._faults(name):
            return self._object_info(await blob.get_blob_properties())

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        _check_prefix(prefix)
        newest = after
        blobs = aiter(self._container.list_blobs(name_starts_with=self._prefix + prefix))
        while True:
            with self._faults(prefix):
                blob = await anext(blobs, None)
            if blob is None:
                return
            found = self._object_info(blob)
            if found.name <= after:
                continue
            if found.name <= newest:
                reason = "it lists out of byte order; accounts with a hierarchical namespace are not supported"
                raise StoreFault(url=self.url, reason=reason)
            newest = found.name
            yield found

    async def delete(self, name: str) -> None:
        blob = self._blob(name)
        try:
            with self._faults(name):
                await blob.delete_blob()
        except ObjectNotFound:
            return

    async def close(self) -> None:
        await self._container.close()
        if self._identity is not None:
            await self._identity.close()

    async def _raise_if_there(self, name: str, refusal: StoreNotPermitted) -> None:
        """Raises ObjectExists if it is, and StoreUnavailable if nobody can say."""
        try:
            await self.info(name)
        except (ObjectNotFound, StoreNotPermitted):
            return
        raise ObjectExists(**refusal.fields) from refusal

    def _blob(self, name: str) -> BlobClient:
        return self._container.get_blob_client(self._prefix + check_object_name(name))

    def _object_info(self, blob: BlobProperties) -> ObjectInfo:
        modified = blob.last_modified
        return ObjectInfo(
            name=blob.name.removeprefix(self._prefix),
            size_bytes=blob.size,
            modified_ns=int(modified.timestamp()) * 10**9,
        )

    @contextmanager
    def _faults(self, name: str, *, is_create: bool = False) -> Iterator[None]:
        """Turns whatever the SDK raises into a StoreFault."""
        try:
            yield
        except HttpResponseError as error:
            raise self._answer_fault(error, name, is_create=is_create) from error
        except (AzureError, aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome_unknown = is_create and not _was_never_sent(error)
            kind = StoreOutcomeUnknown if outcome_unknown else StoreUnavailable
            raise kind(url=self.url, name=name, reason=_reason(error)) from error

    def _answer_fault(self, error: HttpResponseError, name: str, *, is_create: bool) -> StoreFault:
        """What an answer of the service that is not a success means, most specific first."""
        status = error.status_code or 0
        code = getattr(error, "error_code", None) or ""
        code = str(getattr(code, "value", code))
        fields = {
            "url": self.url,
            "name": name,
            "reason": f"{code or 'error'} ({status})" if status else _reason(error),
        }
        if isinstance(error, ClientAuthenticationError) or status in (401, 403):
            if is_create and code in _CODES_EXISTS:
                return ObjectExists(**fields)
            return self._refusal(error, code, fields)
        if code in _CODES_STORE_MISSING:
            return StoreMissing(**fields)
        if status == 404:
            return ObjectNotFound(**fields)
        if is_create and (code in _CODES_EXISTS or status == 412):
            return ObjectExists(**fields)
        if status == 507 or "Quota" in code or "LimitExceeded" in code:
            return StoreFull(**fields)
        if status in _STATUS_REFUSED_UNDONE or code in _CODES_REFUSED_UNDONE:
            return StoreUnavailable(**fields, retry_after_seconds=_retry_after_seconds(error))
        if status >= 500 or status in (0, 408):
            return (StoreOutcomeUnknown if is_create else StoreUnavailable)(**fields)
        return StoreFault(**fields)

    def _refusal(self, error: HttpResponseError, code: str, fields: dict[str, str]) -> StoreNotPermitted:
        """Of a credential that is none here (any more), or of one that may not do this."""
        if not error.status_code:
            reason = "no credentials file was given, and no Azure identity was found on this machine that is good"
            return StoreCredentialRefused(**fields | {"reason": reason})
        end = self._address.signature_end
        if end is not None and end < datetime.datetime.now(datetime.UTC):
            ended = f"the shared access signature ended at {end:%Y-%m-%dT%H:%M:%SZ}"
            return StoreCredentialRefused(**fields | {"reason": ended})
        if error.status_code == 401 or code in _CODES_CREDENTIAL_REFUSED:
            return StoreCredentialRefused(**fields)
        return StoreNotPermitted(**fields)


def _check_prefix(prefix: str) -> None:
    """Raises InvalidValue unless every whole component of the prefix is one of an object name."""
    directory = prefix.rpartition("/")[0]
    if directory or prefix.startswith("/"):
        check_object_name(directory)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or getattr(current, "inner_exception", None)


def _was_never_sent(error: BaseException) -> bool:
    """Whether the request certainly did not reach the service: no connection was made.

    The SDK says ServiceRequestError also for a connection that broke while the request or its answer was on the way.
    """
    if isinstance(error, ServiceRequestTimeoutError):
        return True
    never_connected = aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
    return isinstance(error, ServiceRequestError) and any(
        isinstance(cause, never_connected) for cause in _causes(error)
    )


def _reason(error: BaseException) -> str:
    """The beginning of what the innermost error says: the SDK's own texts repeat requests at length."""
    innermost = list(_causes(error))[-1]
    return " ".join((str(innermost) or str(error)).split())[:REASON_LENGTH_MAX] or type(innermost).__name__


def _retry_after_seconds(error: HttpResponseError) -> float:
    """What the service asks for; 0 if it asks for nothing, or in a way that is not its own (a date)."""
    text = getattr(error.response, "headers", {}).get("Retry-After", "")
    return min(float(text), RETRY_AFTER_SECONDS_MAX) if text.isascii() and text.isdigit() else 0.0
