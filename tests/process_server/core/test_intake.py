"""Every frame is held against certificate, grant, epoch and its predecessor; the first refusal is the last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from process_server.core.intake import DiskIntake, GrantedDisk, check_peer
from process_server.core.segmenting import CHANGE_SET_EXTENTS_MAX
from process_server.errors import DiskStopped
from protocol.errors import LimitExceeded, MalformedInput, NotPermitted, PeerFault, SequenceGap, StaleEpoch
from protocol.messages import Frame
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    CHANGE_SET_RAW_BYTES_MAX,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
    Extent,
    ExtentTable,
    MachineId,
    PeerIdentity,
    Role,
    VaultId,
    extent_table,
)

VAULT, MACHINE, DISK = VaultId("aa" * 16), MachineId("bb" * 16), DiskId("cc" * 16)
GRANTED = GrantedDisk(vault=VAULT, machine=MACHINE, disk=DISK, epoch=3, disk_size_bytes=2**20)
PEER = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=MACHINE)
END = ChangeSetEnd(consistency=Consistency.CRASH)
TABLE = extent_table([Extent(offset_bytes=0, length_bytes=512)])
FRAME = Frame(
    channel=1,
    epoch=3,
    sequence=8,
    frame_number=0,
    extent_count=1,
    raw_bytes=512,
    payload_bytes=512,
    compression=Compression.NONE,
    end=END,
)


def intake(peer: PeerIdentity = PEER) -> DiskIntake:
    return DiskIntake(granted=GRANTED, peer=peer, next_sequence=8)


def changed(**fields: object) -> Frame:
    return dataclasses.replace(FRAME, **fields)  # type: ignore[arg-type]


def test_change_sets_and_their_frames_pass_in_order() -> None:
    checked = intake()
    checked.accept(FRAME, TABLE, current_epoch=3)
    checked.accept(changed(sequence=9, end=None), TABLE, current_epoch=3)
    checked.accept(changed(sequence=9, frame_number=1), TABLE, current_epoch=3)
    checked.accept(changed(sequence=10), TABLE, current_epoch=3)
    assert (checked.next_sequence, checked.next_frame_number) == (11, 0)


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (changed(sequence=7), SequenceGap),
        (changed(sequence=9), SequenceGap),
        (changed(frame_number=1), SequenceGap),
        (changed(epoch=2), StaleEpoch),
        (changed(epoch=4), StaleEpoch),
        (changed(extent_count=2), MalformedInput),
        (changed(raw_bytes=511, payload_bytes=511), MalformedInput),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_passes_after_it(frame: Frame, kind: type[PeerFault]) -> None:
    checked = intake()
    with pytest.raises(kind):
        checked.accept(frame, TABLE, current_epoch=3)
    with pytest.raises(DiskStopped):
        checked.accept(FRAME, TABLE, current_epoch=3)


@pytest.mark.parametrize(
    "table",
    [
        extent_table([Extent(offset_bytes=2**20 - 256, length_bytes=512)]),
        extent_table([Extent(offset_bytes=0, length_bytes=1024)]),
    ],
)
def test_an_extent_table_that_breaks_a_rule_is_malformed_input(table: ExtentTable) -> None:
    with pytest.raises(MalformedInput):
        intake().accept(FRAME, table, current_epoch=3)


def test_an_epoch_that_was_left_meanwhile_is_stale() -> None:
    with pytest.raises(StaleEpoch):
        intake().accept(FRAME, TABLE, current_epoch=4)


@pytest.mark.parametrize(
    "peer",
    [
        PeerIdentity(vault=VAULT, role=Role.AGENT, identifier="bc" * 16),
        PeerIdentity(vault=VaultId("ab" * 16), role=Role.AGENT, identifier=MACHINE),
        PeerIdentity(vault=VAULT, role=Role.PROCESS_SERVER, identifier=MACHINE),
        PeerIdentity(vault=VAULT, role=Role.RECOVERY_WORKER, identifier=MACHINE),
    ],
)
def test_another_machine_vault_or_role_passes_nothing(peer: PeerIdentity) -> None:
    with pytest.raises(NotPermitted):
        check_peer(GRANTED, peer)
    with pytest.raises(NotPermitted):
        intake(peer).accept(FRAME, TABLE, current_epoch=3)


@pytest.mark.parametrize(
    "fill",
    [
        lambda checked: setattr(checked, "raw_bytes", CHANGE_SET_RAW_BYTES_MAX),
        lambda checked: setattr(checked, "extents", CHANGE_SET_EXTENTS_MAX),
    ],
)
def test_a_change_set_beyond_its_limits_is_refused(fill: Callable[[DiskIntake], None]) -> None:
    checked = intake()
    fill(checked)
    with pytest.raises(LimitExceeded):
        checked.accept(FRAME, TABLE, current_epoch=3)


def test_a_change_set_of_too_many_frames_is_refused() -> None:
    checked = intake()
    checked.next_frame_number = CHANGE_SET_FRAMES_MAX - 1
    with pytest.raises(LimitExceeded):
        checked.accept(changed(frame_number=CHANGE_SET_FRAMES_MAX - 1, end=None), TABLE, current_epoch=3)
