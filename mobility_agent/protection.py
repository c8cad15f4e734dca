"""What this machine's operator wants protected, and the newest orders: durable, so that a restart needs nobody.

The intent is written before anything is done about it, and removed after all of it was done.
"""

from __future__ import annotations

from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mobility_agent.disk_identity import have_same_mark
from mobility_agent.errors import AgentStateDamaged, AlreadyProtected, NotProtected, TooManyDisks
from protocol.control import DISKS_PER_MACHINE_MAX, AgentOrders, Disk, DiskIdentity, Path
from runtime.directory import DurableDirectory

PROTECTION_FILE: Final = "protection.json"
ORDERS_FILE: Final = "orders.json"

Release = Literal["keep", "delete"]
_Content = TypeVar("_Content", bound=BaseModel)


class ProtectedDisk(BaseModel):
    """One disk that is, or was until now, to be protected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    identity: DiskIdentity
    disk: Disk | None = None
    """None until it is registered."""
    release: Release | None = None
    """Set: the protection is to end, and what becomes of the recovery points."""


class Protection(BaseModel):
    """All of them, by path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    disks: tuple[ProtectedDisk, ...] = ()

    def at(self, path: str) -> ProtectedDisk | None:
        return next((disk for disk in self.disks if disk.path == path), None)

    def having(self, changed: ProtectedDisk) -> Protection:
        """With this one added, or put in the place of the one at its path."""
        others = tuple(disk for disk in self.disks if disk.path != changed.path)
        return Protection(disks=tuple(sorted((*others, changed), key=lambda disk: disk.path)))

    def without(self, path: str) -> Protection:
        return Protection(disks=tuple(disk for disk in self.disks if disk.path != path))

    def protecting(self, path: str, identity: DiskIdentity) -> Protection:
        """With the disk at `path` protected; the same where it is already.

        Raises AlreadyProtected (under another path), TooManyDisks.
        """
        known = self.at(path)
        if known is not None and known.release is None:
            return self
        for other in self.disks:
            if other.path != path and have_same_mark(other.identity, identity):
                raise AlreadyProtected(path=path, other=other.path)
        if known is None and len(self.disks) >= DISKS_PER_MACHINE_MAX:
            raise TooManyDisks(limit=DISKS_PER_MACHINE_MAX)
        disk = None if known is None else known.disk
        return self.having(ProtectedDisk(path=path, identity=identity, disk=disk))

    def releasing(self, path: str, release: Release) -> Protection:
        """Raises NotProtected."""
        found = self.at(path)
        if found is None:
            raise NotProtected(path=path)
        return self.having(found.model_copy(update={"release": release}))


def read_protection(directory: DurableDirectory) -> Protection:
    """Blocks. Raises AgentStateDamaged."""
    return _read(directory, PROTECTION_FILE, Protection) or Protection()


def write_protection(directory: DurableDirectory, protection: Protection) -> None:
    """Blocks; durable on return."""
    directory.replace(PROTECTION_FILE, protection.model_dump_json().encode())


def read_orders(directory: DurableDirectory) -> AgentOrders | None:
    """The newest orders, None if none ever came. Blocks. Raises AgentStateDamaged."""
    return _read(directory, ORDERS_FILE, AgentOrders)


def write_orders(directory: DurableDirectory, orders: AgentOrders) -> None:
    """Blocks; durable on return."""
    directory.replace(ORDERS_FILE, orders.model_dump_json().encode())


def _read(directory: DurableDirectory, name: str, kind: type[_Content]) -> _Content | None:
    try:
        return kind.model_validate_json(directory.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise AgentStateDamaged(name=name, reason=reason) from error
