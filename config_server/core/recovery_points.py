"""Which reported bookmarks become recovery points, and what is signed about them.

A point is recorded once. The same report again changes nothing, and neither does another statement under the same name:
agents choose the names, and no agent may spoil the report in which a process server speaks for all of them.
"""

from __future__ import annotations

import enum

from protocol.control import CommittedPoint
from protocol.signed_records import PointMember, PointRecord
from protocol.vocabulary import MachineId, VaultId


class Statement(enum.Enum):
    """What a reported point is beside what was recorded under its name for its disk."""

    NEWS = "news"
    REPEAT = "repeat"
    CONTRADICTION = "contradiction"
    """The first statement counts: it may have been signed and published."""


def judge(reported: CommittedPoint, recorded: CommittedPoint | None) -> Statement:
    if recorded is None:
        return Statement.NEWS
    return Statement.REPEAT if recorded == reported else Statement.CONTRADICTION


def point_record(point: CommittedPoint, *, vault: VaultId, machine: MachineId) -> PointRecord:
    """What the authority key signs about a point of one disk."""
    return PointRecord(
        vault=vault,
        point=point.point,
        instant_ns=point.instant_ns,
        consistency=point.consistency,
        members=(PointMember(machine=machine, disk=point.disk, epoch=point.epoch, sequence=point.sequence),),
    )
