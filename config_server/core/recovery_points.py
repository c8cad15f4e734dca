"""Which reported bookmarks become recovery points, and what is signed about them.

A point is recorded once. The same report again changes nothing; another statement under the same name is refused.
"""

from __future__ import annotations

from protocol.control import CommittedPoint
from protocol.control_errors import RequestInvalid
from protocol.signed_records import PointMember, PointRecord
from protocol.vocabulary import MachineId, VaultId


def is_news(reported: CommittedPoint, recorded: CommittedPoint | None) -> bool:
    """Whether it is to be recorded. Raises RequestInvalid if something else was recorded under its name."""
    if recorded is None:
        return True
    if recorded != reported:
        raise RequestInvalid(reason=f"point {reported.point} of disk {reported.disk} was reported otherwise before")
    return False


def point_record(point: CommittedPoint, *, vault: VaultId, machine: MachineId) -> PointRecord:
    """What the authority key signs about a point of one disk."""
    return PointRecord(
        vault=vault,
        point=point.point,
        instant_ns=point.instant_ns,
        consistency=point.consistency,
        members=(PointMember(machine=machine, disk=point.disk, epoch=point.epoch, sequence=point.sequence),),
    )
