"""The signed records of a vault in its store: recovery points and machine descriptions, written once, verified when
read.

What is damaged is told beside what is not, by its name, and never stands in the way of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import InvalidValue, MalformedInput, VersionNotSupported
from protocol.signed_records import (
    SIGNED_RECORD_BYTES_MAX,
    MachineDescription,
    PointRecord,
    SignatureInvalid,
    verify_machine_description,
    verify_point,
)
from protocol.vocabulary import MachineId, VaultId
from storage import object_names
from storage.backends.object_store import ObjectStore
from storage.errors import (
    FormatNotSupported,
    ObjectCorrupt,
    ObjectExists,
    ObjectNotFound,
    ObjectUnreadable,
    StoreOutcomeUnknown,
    VaultFault,
)
from storage.object_names import MachineName, ObjectName, PointName
from storage.parallel_reads import read_each

READS_AT_ONCE: Final = 8

_Record = TypeVar("_Record")
_Verify = Callable[[bytes, Ed25519PublicKey], _Record]
_RECORD_READ_BYTES: Final = SIGNED_RECORD_BYTES_MAX + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPoints:
    """Every sound recovery point record, in ascending order of instant and identifier, and what was damaged."""

    records: tuple[PointRecord, ...]
    damage: tuple[VaultFault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDescriptions:
    """The newest sound description of every machine, in ascending order of machine, and what was damaged."""

    descriptions: tuple[MachineDescription, ...]
    damage: tuple[VaultFault, ...]


class VaultRecords:
    """Points and machine descriptions of one vault in one store. Safe to share between tasks."""

    def __init__(
        self, store: ObjectStore, *, vault: VaultId, authority: Ed25519PublicKey, reads_at_once: int = READS_AT_ONCE
    ) -> None:
        self._reads_at_once = reads_at_once
        self._store = store
        self._vault = vault
        self._authority = authority

    @property
    def store(self) -> ObjectStore:
        return self._store

    @property
    def vault(self) -> VaultId:
        return self._vault

    @property
    def authority(self) -> Ed25519PublicKey:
        return self._authority

    async def put_point(self, signed: bytes) -> PointRecord:
        """Durable on return. Repeating it is harmless.

        Raises SignatureInvalid, MalformedInput, VersionNotSupported (it is not this vault's: nothing was written),
        ObjectExists (another record has the name), StoreFault.
        """
        record = verify_point(signed, self._authority)
        self._check_vault(record.vault)
        await self._create(PointName(vault=self._vault, point=record.point), signed)
        return record

    async def put_machine_description(self, signed: bytes) -> MachineDescription:
        """Durable on return. Repeating it is harmless. Raises as put_point does."""
        description = verify_machine_description(signed, self._authority)
        self._check_vault(description.vault)
        name = MachineName(vault=self._vault, machine=description.machine, version=description.version)
        await self._create(name, signed)
        return description

    async def list_points(self) -> StoredPoints:
        """Raises StoreFault."""

        async def read(name: ObjectName) -> PointRecord | VaultFault:
            try:
                record = await self._read(name, verify_point)
            except VaultFault as fault:
                return fault
            if PointName(vault=record.vault, point=record.point) != name:
                return ObjectCorrupt(name=str(name), reason="it was signed as another point")
            return record

        names = await self._names(object_names.points_prefix(self._vault))
        found = await read_each(names, read, at_once=self._reads_at_once)
        records = [record for record in found if isinstance(record, PointRecord)]
        damage = tuple(fault for fault in found if isinstance(fault, VaultFault))
        records.sort(key=lambda record: (record.instant_ns, record.point))
        return StoredPoints(records=tuple(records), damage=damage)

    async def read_machine_descriptions(self) -> StoredDescriptions:
        """Raises StoreFault."""
        descriptions: dict[MachineId, MachineDescription] = {}
        damage: list[VaultFault] = []
        for name in reversed(await self._names(object_names.machines_prefix(self._vault))):
            if not isinstance(name, MachineName) or name.machine in descriptions:
                continue
            try:
                found = await self._read(name, verify_machine_description)
                if MachineName(vault=found.vault, machine=found.machine, version=found.version) != name:
                    raise ObjectCorrupt(name=str(name), reason="it was signed as another description")
                descriptions[name.machine] = found
            except VaultFault as fault:
                damage.append(fault)
        ordered = tuple(descriptions[machine] for machine in sorted(descriptions))
        return StoredDescriptions(descriptions=ordered, damage=tuple(damage))

    def _check_vault(self, vault: VaultId) -> None:
        if vault != self._vault:
            raise MalformedInput(what="signed record", reason=f"it is of vault {vault}")

    async def _create(self, name: ObjectName, signed: bytes) -> None:
        try:
            await self._store.create(str(name), [signed])
        except (ObjectExists, StoreOutcomeUnknown) as doubt:
            try:
                stored = await self._store.read(str(name), end_byte=_RECORD_READ_BYTES)
            except ObjectNotFound:
                raise doubt from None
            if stored != signed:
                raise ObjectExists(url=self._store.url, name=str(name)) from doubt

    async def _names(self, prefix: str) -> list[ObjectName]:
        names = []
        async for info in self._store.list(prefix):
            try:
                names.append(object_names.parse(info.name))
            except InvalidValue:
                continue
        return names

    async def _read(self, name: ObjectName, verify: _Verify[_Record]) -> _Record:
        text = str(name)
        try:
            return verify(await self._store.read(text, end_byte=_RECORD_READ_BYTES), self._authority)
        except VersionNotSupported as error:
            fields = error.fields
            raise FormatNotSupported(name=text, version=fields["version"], supported=fields["supported"]) from error
        except (SignatureInvalid, MalformedInput, ObjectNotFound, ObjectUnreadable) as error:
            raise ObjectCorrupt(name=text, reason=str(error)) from error
