"""What must stay secret is looked for, byte by byte, wherever it could come out: logs, arguments, environments,
answers, errors, databases, caches, the store, core dumps."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from config_server.installation import ADMIN_TOKEN_FILE
from recovery.opened_vault import open_vault
from runtime.exit_codes import ExitCode
from storage.backends.open_store import open_store
from storage.keys import parse_recovery_key, unwrap_data_key
from tests.scenarios.conftest import ReplicatedSite, replicate_two_points
from tests.scenarios.processes import Finished, run_command
from tests.scenarios.site import Site

WINDOW_BYTES = 24
"""Of a disk's contents: long enough never to occur by chance."""
WINDOWS = 64


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedSite]:
    """A site that logs all it can, made by an operator whose umask hides nothing. All servers run."""
    with umask(0):
        settings = {"log.level": "debug"}
        with Site(
            tmp_path_factory.mktemp("site"), process_server_settings=settings, config_server_settings=settings
        ) as site:
            yield replicate_two_points(site)


@pytest.fixture(scope="module")
def secrets(talkative: ReplicatedSite) -> dict[str, bytes]:
    """Everything that nobody else may see, by what it is; both as it is written and as it is used."""
    site = talkative.site
    found: dict[str, bytes] = {"admin token": (site.config_directory / ADMIN_TOKEN_FILE).read_bytes().strip()}
    for path in site.root.glob("token-*"):
        secret = path.read_text().strip().split(".")[1]
        found[f"secret of {path.name}"] = secret.encode()
        found[f"secret of {path.name}, raw"] = base64.urlsafe_b64decode(secret + "=")
    for path in key_files(talkative):
        found |= {f"private key {number} of {path}": key for number, key in enumerate(private_keys(path))}
    return found | asyncio.run(vault_keys(talkative))


async def vault_keys(made: ReplicatedSite) -> dict[str, bytes]:
    """What the recovery key opens: the vault's private key, and the data key of every segment."""
    key = parse_recovery_key(made.site.recovery_key.read_bytes(), path="recovery key", passphrase=None)
    store = open_store(made.site.store_url)
    vault = await open_vault(store, key)
    found = {"vault's private key": vault.private_key.private_bytes_raw()}
    catalogue = await vault.catalogue(made.disk)
    for segment in catalogue.path_to(catalogue.points[-1]):
        opening = segment.header.opening
        names = {name: getattr(opening, name) for name in ("vault", "machine", "disk", "epoch", "ordinal")}
        for number, wrapped in enumerate(opening.wrapped_keys):
            data_key = unwrap_data_key(wrapped, vault.private_key, name=str(segment.name), **names)
            found[f"data key {number} of {segment.name}"] = data_key
    await store.close()
    assert len(found) > 1
    return found | {f"{name}, in text": base64.b64encode(key) for name, key in found.items()}


def key_files(made: ReplicatedSite) -> list[Path]:
    site = made.site
    return [
        site.recovery_key,
        site.root / "recovery-2.key",
        site.root / "vault-authority.key",
        site.config_directory / "authority-key.pem",
        site.config_directory / "vault-authority-key.json",
        made.agent.directory / "credentials.pem",
        site.process_directory / "credentials.pem",
        site.process_directory / "signing-key.pem",
    ]


def private_keys(path: Path) -> list[bytes]:
    """The secret numbers themselves, and the text in which the file has them."""
    data = path.read_bytes()
    found: list[bytes] = []
    for text in re.findall(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]*PRIVATE KEY-----", data, re.DOTALL):
        key = load_pem_private_key(text, password=None)
        assert isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey)
        is_curve = isinstance(key, EllipticCurvePrivateKey)
        number = key.private_numbers().private_value.to_bytes(32) if is_curve else key.private_bytes_raw()
        found += [number, b"".join(text.split(b"\n")[1:-1])[-64:-16]]
    for text in re.findall(rb'"private_key": "([A-Za-z0-9+/=]+)"', data):
        found += [base64.b64decode(text), text]
    assert found, f"{path} holds no key"
    return found


def contents_of(made: ReplicatedSite) -> dict[str, bytes]:
    """Pieces of the disk that occur nowhere else."""
    data = made.source.path.read_bytes()
    draw = random.Random(5)
    places = [draw.randrange(len(data) - WINDOW_BYTES) for _ in range(4 * WINDOWS)]
    pieces = {f"contents at {place}": data[place : place + WINDOW_BYTES] for place in places}
    distinct = {name: piece for name, piece in pieces.items() if len(set(piece)) > WINDOW_BYTES // 2}
    assert len(distinct) >= WINDOWS
    return distinct


def leaks(data: bytes, secrets: dict[str, bytes]) -> list[str]:
    return [name for name, secret in secrets.items() if secret in data]


def files_under(*directories: Path, but: Sequence[Path] = ()) -> list[Path]:
    found = [path for directory in directories for path in directory.rglob("*") if path.is_file() and path not in but]
    assert found
    return found


def test_what_is_looked_for_would_be_found(talkative: ReplicatedSite, secrets: dict[str, bytes]) -> None:
    for path in key_files(talkative):
        # why: PEM breaks its text into lines; a log would not
        assert leaks(path.read_bytes().replace(b"\n", b""), secrets), path
    assert leaks(talkative.source.path.read_bytes(), contents_of(talkative))


def test_no_log_holds_a_secret_or_contents(talkative: ReplicatedSite, secrets: dict[str, bytes]) -> None:
    for server in talkative.site.servers:
        log = server.log_path.read_bytes()
        assert log, server.name
        assert not leaks(log, secrets | contents_of(talkative)), server.name
        assert b"PRIVATE KEY" not in log


def test_no_running_program_shows_a_secret_to_others(talkative: ReplicatedSite, secrets: dict[str, bytes]) -> None:
    for server in talkative.site.servers:
        for file in ("cmdline", "environ"):
            shown = Path(f"/proc/{server.process_id}/{file}").read_bytes()
            assert shown, file
            assert not leaks(shown, secrets), (server.name, file)


def test_no_file_of_a_process_server_and_none_in_the_store_holds_contents_or_a_key_that_opens_them(
    talkative: ReplicatedSite, secrets: dict[str, bytes]
) -> None:
    site = talkative.site
    for path in files_under(site.store_directory, site.process_directory, but=key_files(talkative)):
        assert not leaks(path.read_bytes(), secrets | contents_of(talkative)), path


def test_no_server_keeps_another_programs_secret(talkative: ReplicatedSite, secrets: dict[str, bytes]) -> None:
    site = talkative.site
    kept = {site.config_directory: {site.config_directory / ADMIN_TOKEN_FILE}, talkative.agent.directory: set()}
    for directory, own in kept.items():
        for path in files_under(directory, but=[*key_files(talkative), *own]):
            assert not leaks(path.read_bytes(), secrets | contents_of(talkative)), path


def test_no_answer_holds_a_secret(talkative: ReplicatedSite, secrets: dict[str, bytes]) -> None:
    site, agent = talkative.site, talkative.agent
    answers: list[Finished] = [
        *(site.farpoint(name, "-o", "json") for name in ("machines", "disks", "process-servers", "points")),
        site.from_storage("points", "--disk", talkative.disk, "-o", "json"),
        site.from_storage("vault", "check-key", "-o", "json"),
        agent.command("status", "-o", "json"),
        *(run_command(program, "config", "show") for program in ("config-server", "process-server", "mobility-agent")),
    ]
    for answer in answers:
        answer.expect(ExitCode.OK)
        assert not leaks((answer.stdout + answer.stderr).encode(), secrets), answer.command
    for endpoint in (site.config_endpoint, site.process_endpoint, agent.endpoint):
        assert not leaks(endpoint.page("metrics").encode(), secrets)


def test_no_error_quotes_what_a_secret_file_holds(tmp_path: Path) -> None:
    canary = "canary-" + "7f3a" * 12
    damaged = tmp_path / "damaged"
    damaged.write_text(f"{canary}\n")
    damaged.chmod(0o600)
    azure = "azure://account/container?endpoint=http://127.0.0.1:9/account"
    commands = [
        (
            "mobility-agent",
            "enroll",
            "--dir",
            tmp_path / "a",
            "--server",
            "https://127.0.0.1:9",
            "--token-file",
            damaged,
        ),
        (
            "process-server",
            "enroll",
            "--dir",
            tmp_path / "p",
            "--server",
            "https://127.0.0.1:9",
            "--token-file",
            damaged,
        ),
        ("farpoint", "points", "--disk", "f" * 32, "--store", f"file://{tmp_path}", "--recovery-key", damaged),
        (
            "farpoint",
            "vault",
            "check-key",
            "--store",
            azure,
            "--store-credentials-file",
            damaged,
            "--recovery-key",
            damaged,
        ),
        ("farpoint", "machines", "--server", "https://127.0.0.1:9", "--ca", damaged, "--token-file", damaged),
        ("config-server", "init", "--dir", tmp_path / "c", "--authority-key", damaged),
    ]
    for program, *arguments in commands:
        for debug in ((), ("--debug",)):
            done = run_command(program, *debug, *arguments)
            assert done.exit_code != ExitCode.OK, done
            assert "Usage:" not in done.stderr, done
            assert canary not in done.stdout + done.stderr, done.command


def test_every_file_that_a_program_makes_is_its_owners_whatever_the_umask(talkative: ReplicatedSite) -> None:
    site = talkative.site
    made = [site.recovery_key, site.root / "recovery-2.key", site.root / "vault-authority.key"]
    made += site.root.glob("token-*")
    for directory in (site.config_directory, site.process_directory, talkative.agent.directory, site.store_directory):
        made += [directory, *directory.rglob("*")]
    open_to_others = {
        str(path.relative_to(site.root)): stat.filemode(path.lstat().st_mode)
        for path in made
        if path.lstat().st_mode & 0o077
    }
    assert not open_to_others


def test_no_program_dumps_core(tmp_path: Path) -> None:
    ordinary = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], cwd=tmp_path)
    if end_by_fault(ordinary) != os.CLD_DUMPED:
        assert "CI" not in os.environ
        pytest.skip("this machine dumps no core of any program")
    with Site(tmp_path) as site:
        agent = site.agent()
        for server in (agent.server, site.process_server, site.config_server):
            assert end_by_fault(server.process) == os.CLD_KILLED, server.name


def end_by_fault(process: subprocess.Popen[bytes]) -> int:
    """How a process ended that met a segmentation fault although its limit allows a dump: CLD_DUMPED or CLD_KILLED."""
    _, most = resource.prlimit(process.pid, resource.RLIMIT_CORE)
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (most, most))
    process.send_signal(signal.SIGSEGV)
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.wait()
    assert ended is not None
    return ended.si_code
