"""Store URLs and Azure credentials: what is taken, what is refused, and that no secret shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from runtime.errors import SecretMissing, SecretUnreadable
from storage.backends.azure_address import AzureAddress, read_address
from storage.backends.open_store import open_store
from storage.errors import StoreMissing, StoreUrlInvalid

KEY = "c2VjcmV0LWtleQ=="
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=backups;AccountKey={KEY};EndpointSuffix=core.windows.net"
SIGNATURE = "sv=2024-11-04&sp=cl&sig=c2VjcmV0"


def read(url: str, credentials_file: Path | None = None, **environment: str) -> AzureAddress:
    return read_address(url, credentials_file=credentials_file, environment=environment)


@pytest.mark.parametrize(
    "url",
    [
        "", "/srv/store", "store", "s3://bucket", "http://host/path", "file:relative", "file://host/share", "file://",
        "file:///a?b=c", "file:///a#b", "file:///a%00b", "azure://", "azure:///container", "azure://account",
        "azure://ACCOUNT/container", "azure://account.example/container", "azure://account/Container",
        "azure://account/con--tainer", "azure://account/container/../other", "azure://account/container/a//b",
        "azure://account/container/a b", "azure://account/container?sig=hunter2", "azure://user:hunter2@account/container",
        "azure://account/container#fragment",
    ],
)  # fmt: skip
async def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreUrlInvalid) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


async def test_a_local_directory_must_exist_unless_it_shall_be_made(tmp_path: Path) -> None:
    with pytest.raises(StoreMissing):
        open_store(f"file://{tmp_path}/new")
    store = open_store(f"file://{tmp_path}/new%20store", create=True)
    assert store.url == f"file://{tmp_path}/new%20store"
    await store.create("a", [b"x"])
    assert (tmp_path / "new store" / "a").read_bytes() == b"x"


def test_an_address_has_account_container_prefix_and_the_public_endpoint() -> None:
    address = read("azure://backups/vault/site/one/", AZURE_STORAGE_KEY=KEY)
    assert (address.account, address.container, address.prefix) == ("backups", "vault", "site/one/")
    assert address.endpoint == "https://backups.blob.core.windows.net"
    assert address.url == "azure://backups/vault/site/one"
    assert read("azure://backups/vault", AZURE_STORAGE_KEY=KEY).url == "azure://backups/vault"


def test_a_credentials_file_holds_any_of_the_three_kinds(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    for text, kind in (
        (CONNECTION, AzureNamedKeyCredential),
        (KEY, AzureNamedKeyCredential),
        (SIGNATURE, AzureSasCredential),
    ):
        file.write_text(f"{text}\n")
        address = read("azure://backups/vault", file, AZURE_STORAGE_KEY="unused")
        assert isinstance(address.credential, kind)
        assert "secret" not in repr(address)
        assert KEY not in repr(address)


def test_a_connection_string_names_its_endpoint(tmp_path: Path) -> None:
    text = f"AccountName=backups;BlobEndpoint=https://private.example/;SharedAccessSignature=?{SIGNATURE}"
    address = read("azure://backups/vault", AZURE_STORAGE_CONNECTION_STRING=text)
    assert address.endpoint == "https://private.example"
    assert isinstance(address.credential, AzureSasCredential)
    assert address.credential.signature == SIGNATURE
    china = CONNECTION.replace("core.windows.net", "core.chinacloudapi.cn")
    assert (
        read("azure://backups/vault", AZURE_STORAGE_CONNECTION_STRING=china).endpoint
        == "https://backups.blob.core.chinacloudapi.cn"
    )


def test_the_environment_counts_in_a_fixed_order() -> None:
    everything = {
        "AZURE_STORAGE_CONNECTION_STRING": CONNECTION,
        "AZURE_STORAGE_SAS_TOKEN": SIGNATURE,
        "AZURE_STORAGE_KEY": KEY,
    }
    assert isinstance(read("azure://backups/vault", **everything).credential, AzureNamedKeyCredential)
    del everything["AZURE_STORAGE_CONNECTION_STRING"]
    assert isinstance(read("azure://backups/vault", **everything).credential, AzureSasCredential)


def test_without_any_secret_the_default_credential_is_meant() -> None:
    assert read("azure://backups/vault").credential is None


def test_without_tls_nothing_but_a_secret_opens_it() -> None:
    with pytest.raises(StoreUrlInvalid, match="no TLS"):
        read("azure://backups/vault?endpoint=http://127.0.0.1:10000/backups")


def test_a_connection_string_of_another_account_is_refused() -> None:
    with pytest.raises(StoreUrlInvalid, match="backups") as caught:
        read("azure://other/vault", AZURE_STORAGE_CONNECTION_STRING=CONNECTION)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    ["http://backups.example", "ftp://127.0.0.1", "https://", "127.0.0.1:10000", "https://a@b", "https://a?b=c"],
)
def test_an_endpoint_without_tls_is_taken_on_this_machine_only(endpoint: str) -> None:
    with pytest.raises(StoreUrlInvalid):
        read(f"azure://backups/vault?endpoint={endpoint}", AZURE_STORAGE_KEY=KEY)
    local = read("azure://backups/vault?endpoint=http://127.0.0.1:10000/backups", AZURE_STORAGE_KEY=KEY)
    assert local.endpoint == "http://127.0.0.1:10000/backups"
    assert read("azure://backups/vault?endpoint=http://[::1]:1/", AZURE_STORAGE_KEY=KEY).endpoint == "http://[::1]:1"


@pytest.mark.parametrize("contents", [b"not base64!", b"AccountName=backups;garbage", b"\xff\xfe", b"%%%", b"", b"\n"])
def test_a_credentials_file_that_holds_something_else_is_named_without_its_contents(
    tmp_path: Path, contents: bytes
) -> None:
    (tmp_path / "credentials").write_bytes(contents)
    with pytest.raises(SecretUnreadable) as caught:
        read("azure://backups/vault", tmp_path / "credentials")
    assert "credentials" in str(caught.value)
    assert "garbage" not in str(caught.value)


def test_a_credentials_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretMissing):
        read("azure://backups/vault", tmp_path / "credentials")


def test_a_local_store_is_opened_without_importing_anything_of_azure(tmp_path: Path) -> None:
    program = "import sys; from storage.backends.open_store import open_store; open_store(sys.argv[1]); "
    program += "sys.exit(any(name.partition('.')[0] in ('azure', 'msal') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program, tmp_path.as_uri()], check=True, timeout=60)


@pytest.mark.parametrize(
    ("signature", "end"),
    [
        ("sv=1&se=2026-11-20T10%3A00%3A00Z&sig=x", "2026-11-20T10:00:00+00:00"),
        ("sv=1&se=2026-11-20&sig=x", "2026-11-20T00:00:00+00:00"),
        ("sv=1&si=policy&sig=x", None),
        ("sv=1&se=never&sig=x", None),
    ],
)
def test_a_signature_says_when_it_ends(signature: str, end: str | None) -> None:
    found = read("azure://backups/vault", AZURE_STORAGE_SAS_TOKEN=signature).signature_end
    assert (found.isoformat() if found else None) == end


def test_a_signature_in_a_file_is_another_when_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("sv=1&se=2026-01-01&sig=first\n")
    address = read("azure://backups/vault", file)
    assert isinstance(address.credential, AzureSasCredential)
    for text, expected in (
        ("sv=1&se=2027-01-01&sig=second", "sv=1&se=2027-01-01&sig=second"),
        ("", "sv=1&se=2027-01-01&sig=second"),
        (CONNECTION, "sv=1&se=2027-01-01&sig=second"),
        ("AccountName=backups;SharedAccessSignature=?sv=1&se=2028-01-01&sig=third", "sv=1&se=2028-01-01&sig=third"),
    ):
        replacement = tmp_path / "new"
        replacement.write_text(text)
        replacement.replace(file)
        assert address.credential.signature == expected
    file.unlink()
    assert address.credential.signature == expected
    assert address.signature_end is not None
    assert address.signature_end.year == 2028
