"""The routes of newcomers and members."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, Field

from config_server.api.route import (
    MEMBERS,
    Access,
    Call,
    DiskPath,
    Nothing,
    Parameters,
    Rooms,
    Route,
)
from protocol.control import (
    BODY_BYTES_MAX,
    NO_REVISION,
    WAIT_SECONDS_MAX,
    AgentOrders,
    AgentReport,
    CertificateBundle,
    CertificateRequest,
    DiskAssignment,
    DiskRegistration,
    ProcessServerOrders,
    ProcessServerReport,
    Revision,
)
from protocol.enrollment import EnrollmentReply, EnrollmentRequest
from protocol.operator_messages import (
    ServerDescription,
)


class OrdersQuery(Parameters):
    """revision: of the orders that the caller has; wait_seconds: how long to hold the request while it is current."""

    revision: Revision = NO_REVISION
    wait_seconds: Annotated[float, Field(ge=0, le=WAIT_SECONDS_MAX, allow_inf_nan=False)] = 0.0


class KeepDataQuery(Parameters):
    keep_data: bool


async def _describe(rooms: Rooms, call: Call) -> BaseModel:
    return rooms.admission.describe()


async def _enroll(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.enroll(call.body, call.address)


async def _renew(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.renew(call.caller.member, call.body.request_pem)


async def _register_disk(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.register_disk(call.machine, call.body)


async def _unregister_disk(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.control_plane.unregister_disk(call.machine, call.path.disk, keep_data=call.query.keep_data)
    return Nothing()


async def _agent_report(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.agent_report(call.machine, call.body, call.caller.member)


async def _agent_orders(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.wait_for_agent_orders(
        call.machine, call.caller.member, revision=call.query.revision, wait_seconds=call.query.wait_seconds
    )


async def _process_server_report(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.process_server_report(call.process_server, call.body, call.caller.member)


async def _process_server_orders(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.wait_for_process_server_orders(
        call.process_server,
        call.caller.member,
        revision=call.query.revision,
        wait_seconds=call.query.wait_seconds,
    )


_ANYONE = frozenset({Access.ANYONE})
_AGENT = frozenset({Access.AGENT})
_PROCESS_SERVER = frozenset({Access.PROCESS_SERVER})

MEMBER_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        template="/v1/authority",
        summary="The certificate authority, to be compared with a join token's hash before it is believed",
        handler=_describe,
        reply=ServerDescription,
        serves=_ANYONE,
    ),
    Route(
        method="POST",
        template="/v1/enrollments",
        summary="Become a member by proving a join token",
        handler=_enroll,
        reply=EnrollmentReply,
        serves=_ANYONE,
        body=EnrollmentRequest,
    ),
    Route(
        method="POST",
        template="/v1/certificates",
        summary="Renew the caller's certificate with a new key",
        handler=_renew,
        reply=CertificateBundle,
        serves=MEMBERS,
        body=CertificateRequest,
    ),
    Route(
        method="POST",
        template="/v1/agent/disks",
        summary="Protect a disk of the calling machine",
        handler=_register_disk,
        reply=DiskAssignment,
        serves=_AGENT,
        body=DiskRegistration,
    ),
    Route(
        method="DELETE",
        template="/v1/agent/disks/{disk}",
        summary="End the protection of a disk of the calling machine",
        handler=_unregister_disk,
        reply=Nothing,
        serves=_AGENT,
        path=DiskPath,
        query=KeepDataQuery,
    ),
    Route(
        method="POST",
        template="/v1/agent/report",
        summary="An agent's heartbeat; answers with its orders",
        handler=_agent_report,
        reply=AgentOrders,
        serves=_AGENT,
        body=AgentReport,
        body_bytes_max=BODY_BYTES_MAX,
    ),
    Route(
        method="GET",
        template="/v1/agent/orders",
        summary="An agent's orders, held until they change",
        handler=_agent_orders,
        reply=AgentOrders,
        serves=_AGENT,
        query=OrdersQuery,
    ),
    Route(
        method="POST",
        template="/v1/process-server/report",
        summary="A process server's heartbeat; answers with its orders",
        handler=_process_server_report,
        reply=ProcessServerOrders,
        serves=_PROCESS_SERVER,
        body=ProcessServerReport,
        body_bytes_max=BODY_BYTES_MAX,
    ),
    Route(
        method="GET",
        template="/v1/process-server/orders",
        summary="A process server's orders, held until they change",
        handler=_process_server_orders,
        reply=ProcessServerOrders,
        serves=_PROCESS_SERVER,
        query=OrdersQuery,
    ),
)
