"""One host over SSH: its key checked before anything else, scripts with deadlines, and a directory that goes with us.

Invariants: a host whose key nobody vouches for learns nothing of us; nothing that is secret is ever an argument; what a
host sends is bounded; the directory there is removed when the connection ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncssh

from farpoint.machine_installation.errors import (
    HostConnectionLost,
    HostKeyChanged,
    HostKeyRefused,
    HostKeyUnknown,
    HostUnreachable,
    KnownHostsUnusable,
    LoginRefused,
    RemoteCommandFailed,
    StepTookTooLong,
)
from runtime.errors import SecretUnreadable
from runtime.secrets import read_secret

SSH_PORT: Final = 22
CONNECT_SECONDS_MAX: Final = 60.0
ALIVE_SECONDS: Final = 15.0
"""A host that says nothing for four times as long is lost."""
CLEAN_SECONDS_MAX: Final = 30.0
OUTPUT_BYTES_MAX: Final = 2**20
BLOCK_BYTES: Final = 2**16
_KEY_KINDS: Final = (
    ("ssh-ed25519",),
    ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    ("rsa-sha2-512", "rsa-sha2-256"),
)
_MARK: Final = "--farpoint--"
"""What stands before a script's own words: the user's shell may greet before it runs anything."""
_BEGIN: Final = f"""export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
echo {_MARK}
"""

_DIRECTORY = """{
umask 077
directory=$(mktemp --directory "${TMPDIR:-/tmp}/farpoint-install.XXXXXXXXXX") && : >"$directory/lock" || exit 1
trap '' HUP INT TERM PIPE
printf '%s\\n' "$directory"
cat >/dev/null
flock "$directory/lock" rm -rf "$directory"
exit
}
"""
"""Ends with the connection: its stdin does. Waits for who still holds the lock: an installation that goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How hosts are reached.

    keys: of the user; none: those of ssh-agent and of the home directory. fingerprint: of the one host key that is
    accepted (`SHA256:…`); then known_hosts do not count.
    """

    user: str
    port: int
    keys: tuple[asyncssh.SSHKey, ...] = field(repr=False)
    known_hosts: asyncssh.SSHKnownHosts
    fingerprint: str | None


def read_key_file(path: Path) -> asyncssh.SSHKey:
    """A private key without a passphrase. Raises SecretMissing, SecretUnreadable. Blocks."""
    try:
        return asyncssh.import_private_key(read_secret(path))
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        reason = f"{error}; a key with a passphrase goes into ssh-agent instead"
        raise SecretUnreadable(path=path, reason=reason) from error


def read_known_hosts(path: Path, *, must_exist: bool) -> asyncssh.SSHKnownHosts:
    """Raises KnownHostsUnusable. Blocks."""
    try:
        return asyncssh.import_known_hosts(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if must_exist:
            raise KnownHostsUnusable(path=path, reason="there is no such file") from error
        return asyncssh.import_known_hosts("")
    except (OSError, ValueError) as error:
        raise KnownHostsUnusable(path=path, reason=str(error)) from error


class _HostKeyCheck(asyncssh.SSHClient):
    """Asked for keys that the known hosts do not name; keeps what was shown, for the operator to compare."""

    def __init__(self, fingerprint: str | None) -> None:
        self._fingerprint = fingerprint
        self.shown: asyncssh.SSHKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.shown = self.shown or key
        return self._fingerprint is not None and key.get_fingerprint() == self._fingerprint


class RemoteHost:
    """An open connection to a host; `connected` makes it."""

    def __init__(self, name: str, connection: asyncssh.SSHClientConnection) -> None:
        self.name = name
        self._connection = connection

    async def run(self, script: str, *, step: str, seconds: float, with_sudo: bool = False) -> str:
        """What a script for sh prints. It goes by stdin: no argument shows any of it.

        with_sudo: as root, where the user is not. Raises RemoteCommandFailed with what it says, StepTookTooLong,
        HostConnectionLost.
        """
        shell = "sudo -n sh -s" if with_sudo else "sh -s"
        with _translated(self.name, step):
            try:
                async with asyncio.timeout(seconds):
                    status, output, errors = await self._converse(shell, f"{_BEGIN}{script}".encode())
            except TimeoutError as error:
                raise StepTookTooLong(host=self.name, step=step, seconds=seconds) from error
        text = output.decode("utf-8", "replace").rpartition(f"{_MARK}\n")[2]
        if status != 0:
            told = f"{text}{errors.decode('utf-8', 'replace')}"
            raise RemoteCommandFailed(host=self.name, step=step, status=status, text=told)
        return text

    async def send_file(
        self, path: Path, target: str, *, step: str, seconds: float, on_bytes: Callable[[int], None]
    ) -> None:
        """Copies a file by SFTP. Raises StepTookTooLong, HostConnectionLost, RemoteCommandFailed, OSError."""

        def show(source: bytes, destination: bytes, done_bytes: int, total_bytes: int) -> None:
            on_bytes(done_bytes)

        with _translated(self.name, step):
            try:
                async with asyncio.timeout(seconds), self._connection.start_sftp_client() as sftp:
                    await sftp.put(str(path), target, progress_handler=show)
            except TimeoutError as error:
                raise StepTookTooLong(host=self.name, step=step, seconds=seconds) from error

    @contextlib.asynccontextmanager
    async def directory(self, *, step: str, seconds: float) -> AsyncIterator[str]:
        """A new directory that only the user and root can enter. It is gone afterwards, even if we are before."""
        with _translated(self.name, step):
            holder = await self._connection.create_process("sh -s", encoding=None)
        try:
            with _translated(self.name, step):
                try:
                    async with asyncio.timeout(seconds):
                        path = await self._made_directory(holder, step)
                except TimeoutError as error:
                    raise StepTookTooLong(host=self.name, step=step, seconds=seconds) from error
            yield path
        except BaseException:
            # why: should this fail too, the host removes it by itself as soon as the connection is gone
            with contextlib.suppress(asyncssh.Error, OSError):
                await _let_go(holder)
            raise
        with _translated(self.name, "clean"):
            try:
                await _let_go(holder)
            except TimeoutError as error:
                raise StepTookTooLong(host=self.name, step="clean", seconds=CLEAN_SECONDS_MAX) from error

    async def _made_directory(self, holder: asyncssh.SSHClientProcess[bytes], step: str) -> str:
        holder.stdin.write(f"{_BEGIN}{_DIRECTORY}".encode())
        while await holder.stdout.readline() not in (f"{_MARK}\n".encode(), b""):
            pass
        path = (await holder.stdout.readline()).decode("utf-8", "replace").rstrip("\n")
        if not path.startswith("/"):
            text = path + (await holder.stderr.read(BLOCK_BYTES)).decode("utf-8", "replace")
            raise RemoteCommandFailed(host=self.name, step=step, status=holder.returncode, text=text)
        return path

    async def _converse(self, command: str, data: bytes) -> tuple[int | None, bytes, bytes]:
        process = await self._connection.create_process(command, encoding=None)
        try:
            # why: a shell that has ended reads no further, and its status says why; a lost connection fails the reads
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(data)
                process.stdin.write_eof()
            async with asyncio.TaskGroup() as group:
                output = group.create_task(_read_bounded(process.stdout))
                errors = group.create_task(_read_bounded(process.stderr))
            await process.wait_closed()
            return process.returncode, output.result(), errors.result()
        finally:
            # why not `async with`: that waits for the program there, however long it hangs
            process.close()


async def _let_go(holder: asyncssh.SSHClientProcess[bytes]) -> None:
    """Of the directory: it is removed on return. Raises TimeoutError."""
    async with asyncio.timeout(CLEAN_SECONDS_MAX):
        holder.stdin.write_eof()
        await holder.wait_closed()


async def _read_bounded(reader: asyncssh.SSHReader[bytes]) -> bytes:
    """To the end; what goes beyond the bound is read and forgotten."""
    data = bytearray()
    while block := await reader.read(BLOCK_BYTES):
        data += block[: OUTPUT_BYTES_MAX - len(data)]
    return bytes(data)


class _translated:  # noqa: N801
    """A context: asyncssh's errors become ours."""

    def __init__(self, host: str, step: str) -> None:
        self._host = host
        self._step = step

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ExceptionGroup) and error.split((asyncssh.Error, ConnectionError))[1] is None:
            # why: a script's two streams are read in a TaskGroup; one connection lost is an error of each
            error = error.exceptions[0]
        if isinstance(error, asyncssh.SFTPError | asyncssh.ChannelOpenError):
            raise RemoteCommandFailed(host=self._host, step=self._step, status=error.code, text=error.reason) from error
        if isinstance(error, asyncssh.Error | ConnectionError):
            raise HostConnectionLost(host=self._host, step=self._step, reason=str(error)) from error


@contextlib.asynccontextmanager
async def connected(host: str, access: Access) -> AsyncIterator[RemoteHost]:
    """A connection whose host key was checked. Raises HostUnreachable, HostKeyUnknown, HostKeyChanged, HostKeyRefused,
    LoginRefused."""
    check = _HostKeyCheck(access.fingerprint)
    try:
        connection = await _connect(host, access, check)
    except asyncssh.HostKeyNotVerifiable as error:
        raise _key_error(host, access, check.shown, error) from error
    except asyncssh.PermissionDenied as error:
        raise LoginRefused(host=host, user=access.user) from error
    except TimeoutError as error:
        reason = f"no answer within {CONNECT_SECONDS_MAX:.0f} s"
        raise HostUnreachable(host=host, port=access.port, reason=reason) from error
    except (asyncssh.Error, OSError) as error:
        raise HostUnreachable(host=host, port=access.port, reason=str(error)) from error
    try:
        yield RemoteHost(host, connection)
    finally:
        connection.close()
        try:
            async with asyncio.timeout(CLEAN_SECONDS_MAX):
                await connection.wait_closed()
        except TimeoutError:
            connection.abort()


async def _connect(host: str, access: Access, check: _HostKeyCheck) -> asyncssh.SSHClientConnection:
    """With a fingerprint, the host is asked for its keys kind by kind, until it shows the one that was meant."""
    if access.fingerprint is None:
        return await _connect_once(host, access, check, ())
    refusals: list[asyncssh.DisconnectError | ConnectionError] = []
    for algorithms in _KEY_KINDS:
        try:
            return await _connect_once(host, access, check, algorithms)
        except asyncssh.PermissionDenied:
            raise
        except (asyncssh.DisconnectError, ConnectionError) as error:
            # why ConnectionError: that is how a host without a key of this kind may end it
            refusals.append(error)
    raise next((error for error in refusals if isinstance(error, asyncssh.HostKeyNotVerifiable)), refusals[0])


async def _connect_once(
    host: str, access: Access, check: _HostKeyCheck, algorithms: tuple[str, ...]
) -> asyncssh.SSHClientConnection:
    own_keys = {"client_keys": list(access.keys), "agent_path": None} if access.keys else {}
    async with asyncio.timeout(CONNECT_SECONDS_MAX):
        return await asyncssh.connect(
            host,
            access.port,
            username=access.user,
            known_hosts=asyncssh.import_known_hosts("") if access.fingerprint else access.known_hosts,
            server_host_key_algs=algorithms,
            client_factory=lambda: check,
            # why: what counts is what was said on the command line, not whose home directory this is
            config=None,
            preferred_auth="publickey",
            keepalive_interval=ALIVE_SECONDS,
            login_timeout=CONNECT_SECONDS_MAX,
            **own_keys,
        )


def _key_error(
    host: str, access: Access, shown: asyncssh.SSHKey | None, error: asyncssh.Error
) -> HostKeyUnknown | HostKeyChanged | HostKeyRefused:
    if shown is None:
        return HostKeyRefused(host=host, reason=error.reason)
    algorithm, fingerprint = shown.get_algorithm(), shown.get_fingerprint()
    known = [access.fingerprint] if access.fingerprint else []
    if not known:
        port = None if access.port == SSH_PORT else access.port
        known = [key.get_fingerprint() for key in access.known_hosts.match(host, "", port)[0]]
    if known:
        return HostKeyChanged(host=host, algorithm=algorithm, fingerprint=fingerprint, known=", ".join(known))
    return HostKeyUnknown(host=host, algorithm=algorithm, fingerprint=fingerprint)


def quoted(text: str) -> str:
    """As one word of sh."""
    return shlex.quote(text)
