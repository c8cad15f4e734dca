"""`farpoint machines install` against a real sshd on a throwaway machine: from nothing to an agent that is heard.

A stand-in for systemctl starts the service there; tests/guest has a real systemd.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from farpoint.demo.programs import free_port
from farpoint.machine_installation import installation
from runtime.exit_codes import ExitCode
from tests.deploy.needed_tools import ROOT, need_tool, run
from tests.deploy.test_packages import dist  # noqa: F401
from tests.deploy.throwaway_machine import ThrowawayMachine, need_throwaway_machine
from tests.farpoint.test_server_commands import RunningServer, server  # noqa: F401

pytestmark = pytest.mark.timeout(1200)

READY_SECONDS_MAX = 60.0
TOKEN = re.compile(rb"[0-9a-f]{32}\.[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{43}")
AGENT = "farpoint-mobility-agent"
STEPS = ["connect", "check", "copy", "install", "enroll", "start", "heard"]

MACHINE = r"""
rm -f /usr/sbin/policy-rc.d
mkdir -p /run/sshd /run/systemd/system
for user in installer nobody-much hanging flooding; do
  useradd --create-home --shell /bin/sh --password '*' $user
done
printf '#!/bin/sh\nexec sleep 600\n' >/usr/local/bin/hanging-shell
chmod +x /usr/local/bin/hanging-shell
usermod --shell /usr/local/bin/hanging-shell hanging
printf '#!/bin/sh\nexec yes\n' >/usr/local/bin/flooding-shell
chmod +x /usr/local/bin/flooding-shell
usermod --shell /usr/local/bin/flooding-shell flooding
usermod --shell /bin/bash installer
echo 'echo Welcome, /stranger.' >~installer/.bashrc  # which bash reads under sshd too
echo 'installer ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/installer
cat >/usr/bin/systemctl <<'SCRIPT'
#!/bin/bash
# Stands for systemd where it does not run: one service, its process noted in a file.
process=/run/farpoint-mobility-agent.process
# Nobody here waits for children that ended.
is_active() { [ -e $process ] && grep -q '^State:.[^Z]' "/proc/$(cat $process)/status" 2>/dev/null; }
case " $* " in
*" is-active "*) is_active ;;
*" try-restart "*) ! is_active || { "$0" stop; "$0" start; } ;;
*" start "*)
  setsid mobility-agent run --set observability.address= >/run/agent.log 2>&1 </dev/null &
  echo $! >$process ;;
*" stop "*)
  if is_active; then kill "$(cat $process)"; while is_active; do sleep 0.1; done; fi ;;
*" status "*) cat /run/agent.log ;;
esac
SCRIPT
# why there: it is the only place where apt lets maintainer scripts look
chmod +x /usr/bin/systemctl
exec /usr/sbin/sshd -D -e -f /mnt/sshd_config
"""

SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey /mnt/host_key
AuthorizedKeysFile /mnt/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
LogLevel VERBOSE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The throwaway machine as SSH shows it. process_id: of its first process, as this machine numbers it."""

    machine: ThrowawayMachine
    port: int
    shared: Path
    process_id: int
    package: Path

    def options(self, server: RunningServer, *, user: str = "installer") -> list[str]:  # noqa: F811
        return [
            *("--port", str(self.port), "--user", user, "--key-file", str(self.shared / "key")),
            *("--known-hosts", str(self.shared / "known_hosts"), "--package", str(self.package)),
            *server.options,
        ]

    def run(self, script: str) -> str:
        """What a bash script says that root runs in it."""
        return run(*self.inside(), "/bin/bash", "-c", f"set -euo pipefail\n{script}")

    def inside(self) -> list[str]:
        """What stands before a command that is to run in it."""
        name_spaces = ["--mount", "--ipc", "--uts", "--pid", "--root", "--wd"]
        return ["nsenter", *name_spaces, f"--target={self.process_id}"]

    def leftovers(self) -> str:
        return self.run("ls -d /tmp/farpoint-install.* 2>/dev/null || true")

    def purge(self) -> None:
        self.run(f"systemctl stop {AGENT}; dpkg --purge {AGENT}; test ! -e /var/lib/farpoint/mobility-agent")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, what


@pytest.fixture(scope="module")
def package(dist: Path) -> Path:  # noqa: F811
    (path,) = dist.glob(f"{AGENT}_*.deb")
    return path


@pytest.fixture(scope="module")
def host(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """With an sshd, a user who may become root (installer), one who may not, and two whose shells are hostile."""
    need_tool("/usr/sbin/sshd", "openssh-server")
    need_tool("sudo", "sudo")
    directory = tmp_path_factory.mktemp("host")
    need_throwaway_machine(directory / "probe")
    shared = directory / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    for name in ("key", "host_key", "other_key"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(shared / name))
        key.write_public_key(str(shared / f"{name}.pub"))
        (shared / name).chmod(0o600)
    port = free_port(12222, taken=set())
    shutil.copy(shared / "key.pub", shared / "authorized_keys")
    (shared / "sshd_config").write_text(SSHD.format(port=port))
    (shared / "known_hosts").write_text(f"[127.0.0.1]:{port} {(shared / 'host_key.pub').read_text()}")
    machine = ThrowawayMachine(directory=directory / "machine", shared=shared, shares_network=True)
    try:
        with machine.running(MACHINE, log=directory / "log") as process:
            log = directory / "log"
            wait_until(lambda: b"Server listening" in log.read_bytes() or process.poll() is not None, "sshd")
            assert process.poll() is None, log.read_text()
            (inner,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield Host(machine=machine, port=port, shared=shared, process_id=int(inner), package=package)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def fresh(host: Host) -> Iterator[Host]:
    """Without the package, before and after."""
    yield host
    host.purge()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "farpoint", "machines", "install", *(str(argument) for argument in arguments)]


def install(*arguments: object) -> Result:
    """In this process."""
    return CliRunner().invoke(main, ["machines", "install", *(str(argument) for argument in arguments)])


def fingerprint(host: Host) -> str:
    return asyncssh.read_public_key(str(host.shared / "host_key.pub")).get_fingerprint()


def test_an_unknown_host_key_is_refused_with_its_fingerprint(host: Host, server: RunningServer) -> None:  # noqa: F811
    refused = install("127.0.0.1", *host.options(server), "--known-hosts", "/dev/null")
    assert refused.exit_code == ExitCode.NOT_PERMITTED, refused.stderr
    assert fingerprint(host) in refused.stderr
    assert "--host-key-fingerprint" in refused.stderr


def test_a_host_with_another_key_than_the_known_one_is_refused(
    host: Host,
    server: RunningServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{host.port} {(host.shared / 'other_key.pub').read_text()}")
    for trusting in (
        ["--known-hosts", known],
        ["--host-key-fingerprint", asyncssh.read_public_key(str(host.shared / "other_key.pub")).get_fingerprint()],
    ):
        refused = install("127.0.0.1", *host.options(server), *trusting)
        assert refused.exit_code == ExitCode.NOT_PERMITTED, refused.stderr
        assert "another host key" in refused.stderr


def test_known_hosts_do_not_count_where_a_fingerprint_is_given(host: Host, server: RunningServer) -> None:  # noqa: F811
    refused = install("127.0.0.1", *host.options(server), "--host-key-fingerprint", "SHA256:" + "A" * 43)
    assert refused.exit_code == ExitCode.NOT_PERMITTED, refused.stderr


def test_a_key_that_the_host_does_not_know_is_not_let_in(host: Host, server: RunningServer) -> None:  # noqa: F811
    refused = install("127.0.0.1", *host.options(server), "--key-file", host.shared / "other_key")
    assert refused.exit_code == ExitCode.NOT_PERMITTED, refused.stderr
    assert "does not let installer in" in refused.stderr


def test_a_user_who_cannot_become_root_is_told_so(host: Host, server: RunningServer) -> None:  # noqa: F811
    refused = install("127.0.0.1", *host.options(server, user="nobody-much"))
    assert refused.exit_code == ExitCode.NOT_PERMITTED, refused.stderr
    assert "sudo -n" in refused.stderr


@pytest.mark.parametrize("user", ["hanging", "flooding"])
def test_a_host_that_says_nothing_or_too_much_has_a_deadline(
    host: Host,
    server: RunningServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    user: str,
) -> None:
    monkeypatch.setattr(installation, "CHECK_SECONDS_MAX", 1.0)
    refused = install("127.0.0.1", *host.options(server, user=user), "-o", "json")
    assert refused.exit_code == ExitCode.FAILURE, refused.stderr
    assert json.loads(refused.stdout)[0]["error_code"] == "step-took-too-long"


def test_a_host_where_nobody_listens_is_unreachable(host: Host, server: RunningServer) -> None:  # noqa: F811
    refused = install("127.0.0.2", *host.options(server), "-o", "json")
    assert refused.exit_code == ExitCode.FAILURE, refused.stderr
    assert json.loads(refused.stdout)[0]["error_code"] == "host-unreachable"


class Watcher(threading.Thread):
    """Reads the arguments of all processes, again and again, for join tokens; the others' are seen here too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_programs = False
        self.tokens: set[bytes] = set()
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.is_set():
            for process in Path("/proc").iterdir():
                if process.name.isdigit():
                    try:
                        arguments = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                    except OSError:
                        continue
                    self.seen_programs |= b"mobility-agent\0enroll" in arguments
                    self.tokens.update(TOKEN.findall(arguments))

    def stop(self) -> None:
        self._is_over.set()
        self.join()


def test_an_agent_gets_onto_a_host_and_nothing_but_that_stays_there(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    """By a user with sudo, a known host key, and a token that nobody can see."""
    watcher = Watcher()
    watcher.start()
    done = subprocess.run(
        command("127.0.0.1", *fresh.options(server), "-o", "json"), cwd=ROOT, capture_output=True, text=True
    )
    watcher.stop()
    assert done.returncode == ExitCode.OK, done.stderr
    (record,) = json.loads(done.stdout)
    assert (record["result"], [step["step"] for step in record["steps"]]) == ("installed", STEPS)
    assert watcher.seen_programs
    assert not watcher.tokens
    assert not TOKEN.search((done.stdout + done.stderr).encode())
    for step in STEPS:
        assert f"127.0.0.1: {step}: " in done.stderr
    assert fresh.leftovers() == ""
    pattern = TOKEN.pattern.decode().replace("\\.", "[.]")
    fresh.run(f"! grep -rEl '{pattern}' /tmp /run /var/lib/farpoint /var/log ~installer")
    listed = CliRunner().invoke(main, ["machines", "-o", "json", *server.options])
    (machine,) = [one for one in json.loads(listed.stdout) if one["machine"] == record["machine"]]
    assert not machine["is_silent"]


def test_what_is_up_to_date_is_left_alone(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    first = install("127.0.0.1", *fresh.options(server), "-o", "json")
    assert first.exit_code == ExitCode.OK, first.stderr
    before = fresh.run("cat /run/farpoint-mobility-agent.process; stat --format=%z /usr/bin/mobility-agent")
    again = install("127.0.0.1", *fresh.options(server, user="root"), "-o", "json")
    assert again.exit_code == ExitCode.OK, again.stderr
    (record,) = json.loads(again.stdout)
    assert record["result"] == "up to date"
    assert record["machine"] == json.loads(first.stdout)[0]["machine"]
    assert [step["step"] for step in record["steps"]] == ["connect", "check", "enroll", "start", "heard"]
    assert fresh.run("cat /run/farpoint-mobility-agent.process; stat --format=%z /usr/bin/mobility-agent") == before


@pytest.fixture(scope="module")
def newer_package(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a later version, as its metadata tells too."""
    tree = tmp_path_factory.mktemp("newer") / "tree"
    run("dpkg-deb", "--raw-extract", package, tree)
    version = run("dpkg-deb", "--field", package, "Version").strip()
    for path in (tree / "DEBIAN/control", *tree.rglob("farpoint-*.dist-info/METADATA")):
        path.write_text(path.read_text().replace(f"Version: {version}\n", f"Version: {version}.1\n", 1))
    target = tree.parent / "newer.deb"
    run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", tree, target)
    shutil.rmtree(tree)
    return target


def test_an_older_agent_is_upgraded_and_stays_the_same_machine(
    fresh: Host,
    server: RunningServer,  # noqa: F811
    newer_package: Path,
) -> None:
    first = install("127.0.0.1", *fresh.options(server), "-o", "json")
    assert first.exit_code == ExitCode.OK, first.stderr
    newer = install("127.0.0.1", *fresh.options(server), "--package", newer_package, "-o", "json")
    assert newer.exit_code == ExitCode.OK, newer.stderr
    before, after = json.loads(first.stdout)[0], json.loads(newer.stdout)[0]
    assert (after["result"], after["version"]) == ("upgraded", before["version"] + ".1")
    assert after["machine"] == before["machine"]
    back = install("127.0.0.1", *fresh.options(server))
    assert back.exit_code == ExitCode.FAILURE
    assert "downgrade" in back.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_it_can_be_interrupted_after_any_step_and_done_again(
    fresh: Host,
    server: RunningServer,  # noqa: F811
    number: signal.Signals,
) -> None:
    for step in STEPS[:-1]:
        process = subprocess.Popen(
            command("127.0.0.1", *fresh.options(server)),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"127.0.0.1: {step}: "):
                process.send_signal(number)
                break
        said = "".join(lines) + process.stderr.read()
        status = process.wait()
        if f"127.0.0.1: {step}: " in said:
            assert status in (-number, ExitCode.INTERRUPTED), f"{step}: {said}"
        else:
            # why: after the interruption before, the host had gone on by itself, and this step was done
            assert (step, status) in (("copy", ExitCode.OK), ("install", ExitCode.OK)), f"{step}: {said}"
        wait_until(lambda: fresh.leftovers() == "", "the host to clean up by itself")
    done = install("127.0.0.1", *fresh.options(server), "-o", "json")
    assert done.exit_code == ExitCode.OK, done.stderr
    assert fresh.leftovers() == ""


def test_an_installation_that_was_cut_off_on_the_host_is_mended(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    """dpkg dies in the middle of unpacking, as in a power cut; apt would refuse to go on."""
    process = subprocess.Popen(
        command("127.0.0.1", *fresh.options(server)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    fresh.run(
        "until [ -d /usr/lib/farpoint/mobility-agent/lib ]; do [ ! -e /usr/bin/mobility-agent ]; done\n"
        "kill -KILL $(pgrep -x dpkg)"
    )
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == ExitCode.FAILURE, said
    assert "half-installed" in fresh.run(f"dpkg-query --show --showformat='${{db:Status-Status}}' {AGENT}")
    done = install("127.0.0.1", *fresh.options(server), "-o", "json")
    assert done.exit_code == ExitCode.OK, done.stderr


def test_a_host_where_another_program_installs_is_locked(
    fresh: Host,
    server: RunningServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installation, "_APT", re.sub(r"Lock::Timeout=\d+", "Lock::Timeout=1", installation._APT))
    holder = (
        "import fcntl, os, sys; lock = os.open('/var/lib/dpkg/lock-frontend', os.O_RDWR | os.O_CREAT);"
        "fcntl.lockf(lock, fcntl.LOCK_EX); print('locked', flush=True); os.read(0, 1)"
    )
    words = [*fresh.inside(), "/usr/bin/python3.11", "-c", holder]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        refused = install("127.0.0.1", *fresh.options(server))
        process.communicate(b"x")
    assert refused.exit_code == ExitCode.LOCKED, refused.stderr


def test_a_copy_that_was_altered_on_the_way_is_not_installed(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    fresh.run("printf '#!/bin/sh\\necho WRONG; exit 1\\n' >/usr/local/bin/sha256sum; chmod +x /usr/local/bin/sha256sum")
    try:
        refused = install("127.0.0.1", *fresh.options(server), "-o", "json")
    finally:
        fresh.run("rm /usr/local/bin/sha256sum")
    assert refused.exit_code == ExitCode.FAILURE, refused.stderr
    assert json.loads(refused.stdout)[0]["error_code"] == "remote-command-failed"
    fresh.run("test ! -e /usr/bin/mobility-agent")
    assert fresh.leftovers() == ""


def test_an_agent_of_another_site_is_left_alone(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    first = install("127.0.0.1", *fresh.options(server))
    assert first.exit_code == ExitCode.OK, first.stderr
    identity = "/var/lib/farpoint/mobility-agent/identity.json"
    fresh.run(f"""sed -i 's/"identifier": "[0-9a-f]*"/"identifier": "{"0" * 31}1"/' {identity}""")
    refused = install("127.0.0.1", *fresh.options(server), "-o", "json")
    assert refused.exit_code == ExitCode.FAILURE, refused.stderr
    assert json.loads(refused.stdout)[0]["error_code"] == "enrolled-elsewhere"


def test_some_of_several_hosts_are_a_part(fresh: Host, server: RunningServer) -> None:  # noqa: F811
    done = install("127.0.0.2", "127.0.0.1", "127.0.0.3", *fresh.options(server), "-o", "json", "--at-once", "2")
    assert done.exit_code == ExitCode.PARTIAL
    results = [(record["host"], record["result"]) for record in json.loads(done.stdout)]
    assert results == [("127.0.0.2", "failed"), ("127.0.0.1", "installed"), ("127.0.0.3", "failed")]
