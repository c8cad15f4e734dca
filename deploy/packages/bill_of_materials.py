"""The bill of materials: CycloneDX 1.6 as JSON, from the lock file's wheels and their metadata."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from deploy.packages.locked import PROJECT, Wheel


def bill_of_materials(wheels: Iterable[Wheel], *, extras: tuple[str, ...], epoch_seconds: int) -> str:
    """Names, versions, licences, hashes and dependencies of the wheels, the project's own among them, as JSON.

    The same wheels, extras and instant give the same text.
    """
    ordered = sorted(wheels, key=lambda wheel: wheel.name)
    components = {wheel.name: _component(wheel) for wheel in ordered}
    bom = Bom()
    digest = hashlib.sha256("".join([*extras, *(wheel.requirement for wheel in ordered)]).encode()).digest()
    bom.serial_number = uuid.UUID(bytes=digest[:16], version=4)
    bom.metadata.timestamp = datetime.fromtimestamp(epoch_seconds, UTC)
    bom.metadata.component = components[PROJECT]
    for name, component in components.items():
        if name != PROJECT:
            bom.components.add(component)
    for wheel in ordered:
        needed = [components[name] for name in wheel.requires if name in components]
        bom.register_dependency(components[wheel.name], needed)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(wheel: Wheel) -> Component:
    return Component(
        type=ComponentType.APPLICATION if wheel.name == PROJECT else ComponentType.LIBRARY,
        name=wheel.name,
        version=wheel.version,
        description=wheel.summary or None,
        purl=PackageURL(type="pypi", name=wheel.name, version=wheel.version),
        bom_ref=f"{wheel.name}=={wheel.version}",
        licenses=[LicenseFactory().make_from_string(wheel.licence)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
    )
