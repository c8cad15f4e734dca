"""Where an Azure Blob store is and with what it is opened: read from a URL, a credentials file, or the usual Azure
environment.

Invariants: a secret is never part of the URL, of an error, or of a `repr`; without TLS only this machine is spoken to.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qs, urlsplit

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.credentials_async import AsyncTokenCredential

from protocol.errors import InvalidValue
from runtime.errors import SecretUnreadable
from runtime.secrets import read_secret
from storage.backends.azure_signature import SignatureInFile
from storage.backends.object_store import check_object_name
from storage.errors import StoreUrlInvalid

PUBLIC_CLOUD_SUFFIX: Final = "blob.core.windows.net"
CONNECTION_STRING_VARIABLE: Final = "AZURE_STORAGE_CONNECTION_STRING"
SIGNATURE_VARIABLE: Final = "AZURE_STORAGE_SAS_TOKEN"
KEY_VARIABLE: Final = "AZURE_STORAGE_KEY"

_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}")
_CONTAINER: Final = re.compile(r"(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*")

AzureCredential = AzureNamedKeyCredential | AzureSasCredential | AsyncTokenCredential


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureAddress:
    """prefix: empty, or ends in a slash. endpoint: the account's blob service, without a trailing slash."""

    account: str
    container: str
    prefix: str
    endpoint: str
    credential: AzureCredential | None = field(repr=False)
    """None: DefaultAzureCredential (managed identity, workload identity, the signed-in developer)."""

    @property
    def url(self) -> str:
        return f"azure://{self.account}/{self.container}/{self.prefix}".rstrip("/")

    @property
    def signature_end(self) -> datetime.datetime | None:
        """When a shared access signature ends; None for other credentials, and if it does not say so itself."""
        if not isinstance(self.credential, AzureSasCredential):
            return None
        text = parse_qs(self.credential.signature).get("se", [""])[0]
        try:
            end = datetime.datetime.fromisoformat(text)
        except ValueError:
            return None
        return end if end.tzinfo is not None else end.replace(tzinfo=datetime.UTC)


def read_address(url: str, *, credentials_file: Path | None, environment: Mapping[str, str]) -> AzureAddress:
    """Reads `azure://account/container/prefix`, `?endpoint=…` at its end naming another blob endpoint (an emulator, a
    private one).

    credentials_file holds a connection string, an account key, or a shared access signature. Without it the variables
    AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_KEY count, in this order. A signature in
    a file is read again when the file changes, another secret is not.
    Raises StoreUrlInvalid, SecretMissing or SecretUnreadable.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreUrlInvalid(url="…", reason="what follows its slashes is no part of a URL") from error
    url = _without_query(parts)
    options = parse_qs(parts.query)
    if set(options) - {"endpoint"} or parts.fragment or "@" in parts.netloc:
        raise StoreUrlInvalid(url=url, reason="it may have the option endpoint, no other, and no credentials")
    account, container, prefix = _names(url, parts)
    secret, origin = _read_secret_text(credentials_file, environment)
    is_connection_string = "AccountName=" in secret or "BlobEndpoint=" in secret
    connection = _connection_settings(secret, origin) if is_connection_string else {}
    if connection.get("ACCOUNTNAME", account) != account:
        raise StoreUrlInvalid(url=url, reason=f"the connection string is for account {connection['ACCOUNTNAME']}")
    endpoint = (options.get("endpoint") or [_endpoint(account, connection)])[0].rstrip("/")
    _check_endpoint(url, endpoint)
    if is_connection_string:
        secret = _secret_of(connection)
    if not secret and not endpoint.startswith("https:"):
        reason = "its endpoint has no TLS, and takes a key or a shared access signature only; none was given"
        raise StoreUrlInvalid(url=url, reason=reason)
    return AzureAddress(
        account=account,
        container=container,
        prefix=prefix,
        endpoint=endpoint,
        credential=_credential(account, secret, origin, credentials_file) if secret else None,
    )


def _names(url: str, parts: SplitResult) -> tuple[str, str, str]:
    account = parts.netloc
    container, _, prefix = parts.path.strip("/").partition("/")
    if parts.scheme != "azure" or not _ACCOUNT.fullmatch(account):
        raise StoreUrlInvalid(url=url, reason="the account's name has 3 to 24 lower-case letters and digits")
    if not _CONTAINER.fullmatch(container):
        raise StoreUrlInvalid(
            url=url, reason="the container's name has 3 to 63 lower-case letters, digits and single hyphens"
        )
    if prefix:
        try:
            check_object_name(prefix)
        except InvalidValue as error:
            raise StoreUrlInvalid(url=url, reason="the prefix must be a path of plain ASCII components") from error
    return account, container, f"{prefix}/" if prefix else ""


def _read_secret_text(credentials_file: Path | None, environment: Mapping[str, str]) -> tuple[str, str]:
    if credentials_file is not None:
        try:
            text = read_secret(credentials_file).decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise SecretUnreadable(path=credentials_file, reason="it is not text") from error
        if not text:
            raise SecretUnreadable(path=credentials_file, reason="it is empty")
        return text, str(credentials_file)
    for variable in (CONNECTION_STRING_VARIABLE, SIGNATURE_VARIABLE, KEY_VARIABLE):
        if environment.get(variable):
            return environment[variable].strip(), f"environment {variable}"
    return "", ""


def _connection_settings(text: str, origin: str) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in text.strip(";").split(";")]
    if not all(separator for _, separator, _ in pairs):
        raise SecretUnreadable(path=origin, reason="it is not a whole connection string")
    return {key.strip().upper(): value for key, _, value in pairs}


def _secret_of(connection: Mapping[str, str]) -> str:
    return connection.get("ACCOUNTKEY") or connection.get("SHAREDACCESSSIGNATURE", "")


def _signature_in(path: Path) -> str:
    """Of a credentials file. Raises SecretMissing, and SecretUnreadable also for a file that holds another secret."""
    secret, origin = _read_secret_text(path, {})
    if "SharedAccessSignature=" in secret:
        secret = _secret_of(_connection_settings(secret, origin))
    if not _is_signature(secret):
        raise SecretUnreadable(path=path, reason="it holds no shared access signature")
    return secret.removeprefix("?")


def _is_signature(secret: str) -> bool:
    return "sig=" in secret


def _endpoint(account: str, connection: Mapping[str, str]) -> str:
    if "BLOBENDPOINT" in connection:
        return connection["BLOBENDPOINT"]
    scheme = connection.get("DEFAULTENDPOINTSPROTOCOL", "https")
    suffix = connection.get("ENDPOINTSUFFIX")
    return f"{scheme}://{account}.blob.{suffix}" if suffix else f"{scheme}://{account}.{PUBLIC_CLOUD_SUFFIX}"


def _check_endpoint(url: str, endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        is_port = parts.port != 0
    except ValueError as error:
        raise StoreUrlInvalid(url=url, reason="its endpoint must be an https URL without a query") from error
    is_plain = endpoint.isprintable() and " " not in endpoint
    if (
        not is_port
        or not is_plain
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or "@" in parts.netloc
    ):
        raise StoreUrlInvalid(url=url, reason="its endpoint must be an https URL without a query")
    if parts.scheme == "http" and not _is_this_machine(parts.hostname):
        raise StoreUrlInvalid(url=url, reason=f"its endpoint at {parts.hostname} must be https")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _credential(account: str, secret: str, origin: str, file: Path | None) -> AzureCredential:
    if _is_signature(secret) and file is not None:
        return SignatureInFile(file, lambda: _signature_in(file))
    if _is_signature(secret):
        return AzureSasCredential(secret.removeprefix("?"))
    try:
        base64.b64decode(secret, validate=True)
    except ValueError as error:
        reason = "it is neither a connection string nor a shared access signature nor an account key"
        raise SecretUnreadable(path=origin, reason=reason) from error
    return AzureNamedKeyCredential(account, secret)


def _without_query(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
