"""Names have one spelling, sort as their numbers do, and nothing else is one."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies

from protocol.errors import InvalidValue
from protocol.vocabulary import EPOCH_MAX, DiskId, MachineId, PointId, VaultId
from storage import object_names
from storage.object_names import ORDINAL_MAX, MachineName, PointName, SegmentName, VaultName

VAULT = VaultId("a1" * 16)
DISK = DiskId("c3" * 16)
NAMES = {
    f"vaults/{VAULT}/vault.json": VaultName(vault=VAULT),
    f"vaults/{VAULT}/machines/{'b2' * 16}/0000000003.machine": MachineName(
        vault=VAULT, machine=MachineId("b2" * 16), version=3
    ),
    f"vaults/{VAULT}/disks/{DISK}/0000000007/000000000012.seg": SegmentName(
        vault=VAULT, disk=DISK, epoch=7, ordinal=12
    ),
    f"vaults/{VAULT}/points/{'f6' * 16}.point": PointName(vault=VAULT, point=PointId("f6" * 16)),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_has_one_spelling(text: str) -> None:
    assert str(NAMES[text]) == text
    assert object_names.parse(text) == NAMES[text]


@given(
    epochs=strategies.tuples(*[strategies.integers(1, EPOCH_MAX)] * 2),
    ordinals=strategies.tuples(*[strategies.integers(1, ORDINAL_MAX)] * 2),
)
def test_names_sort_as_their_numbers_do(epochs: tuple[int, int], ordinals: tuple[int, int]) -> None:
    first, second = (
        SegmentName(vault=VAULT, disk=DISK, epoch=epoch, ordinal=ordinal)
        for epoch, ordinal in zip(epochs, ordinals, strict=True)
    )
    assert (str(first) < str(second)) == ((first.epoch, first.ordinal) < (second.epoch, second.ordinal))
    assert object_names.parse(str(first)) == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vaults",
        f"vaults/{VAULT}/vault.json/",
        f"/vaults/{VAULT}/vault.json",
        f"vaults/{VAULT.upper()}/vault.json",
        f"vaults/{VAULT}/disks/{DISK}/7/12.seg",
        f"vaults/{VAULT}/disks/{DISK}/0000000007/000000000000.seg",
        f"vaults/{VAULT}/disks/{DISK}/0000000000/000000000001.seg",
        f"vaults/{VAULT}/disks/{DISK}/9999999999/000000000001.seg",
        f"vaults/{VAULT}/disks/{DISK}/0000000007/000000000012.seg\n",
        f"vaults/{VAULT}/disks/{DISK}/0000000007/00000000001٢.seg",
        f"vaults/{VAULT}/disks/{DISK}/0000000007/000000000012.map",
        f"vaults/{VAULT}/disks/{DISK}/folds/0000000001.fold",
        f"vaults/{VAULT}/points/../vault.json",
    ],
)
def test_what_this_version_does_not_write_is_no_name(text: str) -> None:
    with pytest.raises(InvalidValue):
        object_names.parse(text)


def test_what_lies_behind_a_folder_sorts_behind_all_in_it_and_before_the_next_folder() -> None:
    prefix = object_names.epoch_prefix(VAULT, DISK, 7)
    behind = object_names.behind_folder(prefix)
    assert prefix + "\x7f" < behind < object_names.epoch_prefix(VAULT, DISK, 8)
