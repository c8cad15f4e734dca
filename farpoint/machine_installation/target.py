"""What a host is, by one script that changes nothing there; and whether the package fits it.

Invariant: what a host says is data: unknown and missing answers make it unfit, never fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from farpoint.machine_installation.agent_package import PACKAGE, AgentPackage
from farpoint.machine_installation.errors import HostUnfit, RootNeeded

SPARE_BYTES: Final = 64 * 2**20
"""What must be free beyond the package and what it unpacks to."""

PROBE: Final = f"""
say() {{ printf '%s=%s\\n' "$1" "$2"; }}
say kernel "$(uname -s)"
say name "$(. /etc/os-release 2>/dev/null && printf '%s' "$PRETTY_NAME")"
say architecture "$(dpkg --print-architecture 2>/dev/null)"
say installer "$(command -v apt-get)"
if [ -d /run/systemd/system ]; then say systemd "$(command -v systemctl)"; fi
say uid "$(id -u)"
if [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then say root yes; fi
say package "$(dpkg-query --show --showformat='${{db:Status-Status}} ${{Version}}' {PACKAGE} 2>/dev/null)"
say free_bytes "$(df --output=avail --block-size=1 /usr /var/lib "${{TMPDIR:-/tmp}}" | sed 1d | sort -n | head -n 1)"
"""
"""For sh, as the user that logs in."""

INSTALLED: Final = "installed"
NOT_THERE: Final = ("", "not-installed", "config-files")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A host as it described itself. package_state, package_version: dpkg's; "" where it does not know the package."""

    kernel: str
    name: str
    architecture: str
    has_apt: bool
    has_systemd: bool
    is_root: bool
    can_be_root: bool
    free_bytes: int
    package_state: str
    package_version: str

    @property
    def is_interrupted(self) -> bool:
        """An installation was cut off half-way."""
        return self.package_state not in (INSTALLED, *NOT_THERE)

    def has(self, package: AgentPackage) -> bool:
        return self.package_state == INSTALLED and self.package_version == package.version


def parse_probe(text: str) -> Target:
    """What PROBE printed. Never fails: what is missing is empty or zero."""
    said = dict(line.partition("=")[::2] for line in text.splitlines())
    state, _, version = said.get("package", "").partition(" ")
    free = said.get("free_bytes", "").strip()
    return Target(
        kernel=said.get("kernel", ""),
        name=said.get("name", ""),
        architecture=said.get("architecture", ""),
        has_apt=bool(said.get("installer")),
        has_systemd=bool(said.get("systemd")),
        is_root=said.get("uid") == "0",
        can_be_root=said.get("root") == "yes",
        free_bytes=int(free) if free.isascii() and free.isdigit() else 0,
        package_state=state,
        package_version=version,
    )


def check_target(target: Target, package: AgentPackage, *, host: str, user: str) -> None:
    """Raises HostUnfit with the first reason, RootNeeded."""
    if target.kernel != "Linux":
        raise HostUnfit(host=host, reason=f"it runs {target.kernel or 'an unknown system'}, not Linux")
    if not target.architecture or not target.has_apt:
        raise HostUnfit(
            host=host, reason=f"{target.name or 'its system'} has no dpkg and apt-get; see the offline bundle"
        )
    if target.architecture != package.architecture:
        raise HostUnfit(host=host, reason=f"it is {target.architecture}, the package is for {package.architecture}")
    if not target.has_systemd:
        raise HostUnfit(host=host, reason="it does not run systemd")
    if not target.can_be_root:
        raise RootNeeded(host=host, user=user)
    needed_bytes = package.size_bytes + package.installed_bytes + SPARE_BYTES
    if not target.has(package) and target.free_bytes < needed_bytes:
        free, needed = target.free_bytes >> 20, needed_bytes >> 20
        raise HostUnfit(
            host=host, reason=f"{free} MiB are free in /usr, /var or its temporary directory, {needed} needed"
        )
