"""The control plane's words: what goes through unchanged, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from protocol import control
from protocol.control import (
    BODY_BYTES_MAX,
    DISKS_PER_MACHINE_MAX,
    DISKS_PER_PROCESS_SERVER_MAX,
    AgentOrders,
    AgentReport,
    CommittedPoint,
    ControlMessage,
    DiskIdentity,
    DiskKind,
    DiskOrder,
    DiskPosition,
    DiskRegistration,
    DiskReport,
    DiskState,
    FaultReport,
    HostDescription,
    ProcessServerAddress,
    ProcessServerOrders,
    ProcessServerReport,
    PublishMachineDescription,
    PublishPoint,
    RevocationList,
)
from protocol.control_errors import REFUSALS
from protocol.enrollment import EnrollmentRequest
from protocol.operator_messages import JoinTokenRequest, OperatorReply
from protocol.vocabulary import Consistency, DiskId, MachineId, PointId, ProcessServerId, Role

DISK = DiskId("d" * 32)
HOST = HostDescription(name="db-1", processors=4, memory_bytes=2**33, firmware="uefi")
IDENTITY = DiskIdentity(kind=DiskKind.BLOCK_DEVICE, size_bytes=2**30, logical_sector_bytes=512, wwn="naa.5")
POINT = CommittedPoint(
    disk=DISK, epoch=1, sequence=1, point=PointId("e" * 32), instant_ns=1, consistency=Consistency.APPLICATION
)
DISK_REPORT = DiskReport(
    disk=DISK, path="/dev/vda", state=DiskState.STOPPED, source="scan", size_bytes=2**30,
    error=FaultReport(code="disk-vanished", detail="gone", hint="plug it in"),
)  # fmt: skip
POSITION = DiskPosition(
    disk=DISK, epoch=2, durable_sequence=9, committed_sequence=8, cached_bytes=7, received_bytes=6, stored_bytes=5
)
ADDRESS = ProcessServerAddress(process_server=ProcessServerId("a" * 32), host="::1", port=9443)
REVOKED = RevocationList(number=3, serials=("0A", "FF00"))

MESSAGES: tuple[ControlMessage, ...] = (
    DiskRegistration(path="/dev/vda", identity=IDENTITY, disk=DISK),
    AgentReport(boot_id="b", agent_version="1", host=HOST, disks=(DISK_REPORT,)),
    AgentOrders(
        revision="0" * 32, now_ns=1, heartbeat_seconds=10.0, renew_certificate=True, revoked=REVOKED,
        disks=(
            DiskOrder(
                disk=DISK, process_server=ADDRESS, is_paused=False, copy_interval_seconds=1.0,
                point_interval_seconds=2.5,
            ),
        ),
    ),
    ProcessServerReport(
        version="1", host="h", port=1, cache_bytes=0, cache_limit_bytes=1, positions=(POSITION,),
        committed_points=(POINT,), completed_orders=("f" * 32,), faults=(FaultReport(code="x", detail="y"),),
    ),
    ProcessServerOrders(
        revision="", now_ns=1, heartbeat_seconds=10.0, renew_certificate=False, revoked=REVOKED,
        grants=(bytes(range(256)),),
        orders=(
            PublishPoint(order="1" * 32, point=PointId("e" * 32), record=b"\x00\xff"),
            PublishMachineDescription(order="2" * 32, machine=MachineId("3" * 32), version=1, record=b"r"),
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_from_json_as_it_went(message: ControlMessage) -> None:
    assert type(message).model_validate_json(message.model_dump_json()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_an_unknown_field_is_refused_at_every_depth(message: ControlMessage) -> None:
    def spoil(value: Any) -> Any:
        """Yields copies, each with one more field in one object."""
        if isinstance(value, dict):
            yield value | {"surprise": 1}
            for key, inner in value.items():
                for spoilt in spoil(inner):
                    yield value | {key: spoilt}
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                for spoilt in spoil(inner):
                    yield [*value[:place], spoilt, *value[place + 1 :]]

    for spoilt in spoil(json.loads(message.model_dump_json())):
        with pytest.raises(ValidationError):
            type(message).model_validate_json(json.dumps(spoilt))


@pytest.mark.parametrize(
    "change",
    [
        {"disk": "D" * 32}, {"disk": "d" * 31}, {"disk": "d" * 32 + "\n"}, {"epoch": 0}, {"epoch": 2**32},
        {"sequence": 0}, {"sequence": 2**63}, {"sequence": True}, {"sequence": "1"}, {"sequence": 1.0},
        {"instant_ns": -1}, {"instant_ns": 2**63}, {"consistency": "unsettled"}, {"consistency": "perfect"},
        {"point": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_outside_its_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CommittedPoint.model_validate_json(json.dumps(json.loads(POINT.model_dump_json()) | change))


def test_an_unsettled_position_is_no_point_and_the_server_enrols_nobody_as_itself() -> None:
    with pytest.raises(ValidationError):
        POINT.__class__(**(POINT.model_dump() | {"consistency": Consistency.UNSETTLED}))
    with pytest.raises(ValidationError):
        JoinTokenRequest(role=Role.CONFIGURATION_SERVER)


@given(st.binary(max_size=300))
def test_no_bytes_make_a_message_parser_raise_anything_but_its_own_error(data: bytes) -> None:
    for message in (AgentReport, ProcessServerReport, DiskRegistration, EnrollmentRequest):
        with pytest.raises(ValidationError):
            message.model_validate_json(data)


def test_the_largest_reports_fit_into_a_body() -> None:
    report = AgentReport(boot_id="b", agent_version="1", host=HOST, disks=(DISK_REPORT,) * DISKS_PER_MACHINE_MAX)
    assert len(report.model_dump_json()) < BODY_BYTES_MAX
    largest = ProcessServerReport(
        version="1", host="h", port=1, cache_bytes=0, cache_limit_bytes=1,
        positions=(POSITION,) * DISKS_PER_PROCESS_SERVER_MAX,
        committed_points=(POINT,) * control.COMMITTED_POINTS_PER_REPORT_MAX,
    )  # fmt: skip
    assert len(largest.model_dump_json()) < BODY_BYTES_MAX
    with pytest.raises(ValidationError):
        AgentReport(boot_id="b", agent_version="1", host=HOST, disks=(DISK_REPORT,) * (DISKS_PER_MACHINE_MAX + 1))


def test_every_text_list_and_binary_field_has_a_limit() -> None:
    unbounded = [
        f"{model.__name__}.{name}"
        for model in _models(ControlMessage)
        for name, schema in model.model_json_schema().get("properties", {}).items()
        for one in (schema, *schema.get("anyOf", ()))
        if one.get("type") in ("string", "array")
        and not ({"maxLength", "maxItems", "pattern", "enum", "const", "format"} & set(one))
    ]
    assert unbounded == []


def test_operators_clients_tolerate_what_a_newer_server_adds() -> None:
    for model in _models(OperatorReply):
        assert model.model_config["extra"] == "ignore"


def test_every_refusal_can_be_made_from_what_travels() -> None:
    assert len(REFUSALS) == len({kind.code for kind in REFUSALS.values()})
    for code, kind in REFUSALS.items():
        assert kind.code == code


def _models(root: type[BaseModel]) -> list[type[BaseModel]]:
    found = []
    for model in root.__subclasses__():
        found += [model, *_models(model)]
    return found
