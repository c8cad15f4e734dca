"""Which recovery point of a disk is meant by `latest`, by an identifier or by an instant.

Only points of the disk's own history are offered, and all of them are settled. What is not there is answered with its
neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from protocol.vocabulary import DiskId
from recovery.core.instants import instant_text, parse_instant
from recovery.errors import PointAmbiguous, PointNotFound, PointSelectorInvalid
from storage.history import HistoryPoint

LATEST: Final = "latest"
PREFIX_DIGITS_MIN: Final = 8
NEIGHBOURS_MAX: Final = 3
_PREFIX: Final = re.compile(r"[0-9a-f]{8,32}")


def point_text(point: HistoryPoint) -> str:
    """A point for a message: its identifier and its instant."""
    return f"{point.point} of {instant_text(point.instant_ns)}"


def choose_point(points: Sequence[HistoryPoint], selector: str, *, disk: DiskId) -> HistoryPoint:
    """selector: `latest`, a unique prefix of an identifier, or an instant: the newest point at or before it.

    Raises PointNotFound (naming the nearest points), PointAmbiguous, PointSelectorInvalid.
    """
    offered = by_age(points)
    if selector == LATEST:
        return _newest(offered, offered, selector, disk)
    if _PREFIX.fullmatch(selector.lower()):
        found = [point for point in offered if point.point.startswith(selector.lower())]
        if len({point.point for point in found}) > 1:
            raise PointAmbiguous(disk=disk, selector=selector, found=", ".join(point.point for point in found))
        return _newest(found, offered[-NEIGHBOURS_MAX:], selector, disk)
    instant_ns = parse_instant(selector)
    if instant_ns is None:
        reason = f"it is neither `{LATEST}`, nor {PREFIX_DIGITS_MIN} to 32 hexadecimal digits, nor an RFC 3339 instant"
        raise PointSelectorInvalid(selector=selector, reason=reason)
    return _newest(
        [point for point in offered if point.instant_ns <= instant_ns], offered[:NEIGHBOURS_MAX], selector, disk
    )


def by_age(points: Iterable[HistoryPoint]) -> list[HistoryPoint]:
    """Of one disk, oldest first: in the order in which they were marked, which is that of their positions."""
    # why: the server's clock ticks coarsely, so that neighbouring points can share an instant, and it may have been
    # set, so that an older point can have the later one
    return sorted(points, key=lambda point: point.position)


def _newest(
    found: Sequence[HistoryPoint], neighbours: Sequence[HistoryPoint], selector: str, disk: DiskId
) -> HistoryPoint:
    if not found:
        nearest = ", ".join(point_text(point) for point in neighbours) or "there is none at all"
        raise PointNotFound(disk=disk, selector=selector, nearest=nearest)
    return found[-1]
