"""Tells a machine that was restarted from two machines with one identity: a boot that ended never speaks again.

A copy of an agent (a cloned disk, a restored image that was started beside the original) has its certificate and key.
Both of them report; whichever is second looks like a restart, and the first one's next report gives them away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENDED_BOOTS_MAX: Final = 8
"""Of how many boots before the present one it is remembered that they ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootHistory:
    """boot_id: of the newest boot that was heard, empty before the first; ended: earlier ones, oldest first."""

    boot_id: str
    ended: tuple[str, ...]


def observe_boot(history: BootHistory, boot_id: str) -> BootHistory | None:
    """After a report of this boot; None: it had ended, so somebody else has been reporting since."""
    if boot_id == history.boot_id:
        return history
    if boot_id in history.ended:
        return None
    ended = (*history.ended, history.boot_id) if history.boot_id else history.ended
    return BootHistory(boot_id=boot_id, ended=ended[-ENDED_BOOTS_MAX:])
