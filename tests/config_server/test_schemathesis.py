"""The server is held against its own OpenAPI document: schemathesis makes requests of it, right and wrong, as each kind
of caller, and looks at every answer."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from protocol.enrollment import CREDENTIALS_FILE
from protocol.operator_messages import OperatorRole, ReplicationPolicy
from protocol.vocabulary import Role
from tests.config_server.running import agent_report, process_server_report, registration, running_server

EXAMPLES = 12
"""Of each operation and phase."""
SECONDS_MAX = 240
UNFIT_CHECKS = "positive_data_acceptance"
"""There are rules that no schema can say: that one field is at least twice another, that 40.0 is no integer here."""
UNFIT_FOR_MEMBERS = "missing_required_header"
"""They show a certificate, which it takes for nothing: without a token they are known all the same, and refused."""


@pytest.mark.timeout(SECONDS_MAX + 60)
@pytest.mark.parametrize("caller", ["administrator", "viewer", "agent", "process-server"])
async def test_every_answer_is_what_the_document_says(tmp_path: Path, caller: str) -> None:
    async with running_server(tmp_path / "server") as server:
        async with server.operator() as operator, await server.agent(tmp_path / "agent") as agent:
            disk = await agent.register_disk(registration())
            await agent.report(agent_report(disk.disk))
            await operator.create_policy(
                ReplicationPolicy(name="gold", rpo_threshold_seconds=600.0, point_interval_seconds=60.0)
            )
        async with await server.process_server(tmp_path / "process-server") as process_server:
            await process_server.report(process_server_report())
        unfit = UNFIT_CHECKS
        options = [f"--tls-verify={server.path / 'authority.pem'}"]
        if caller in (Role.AGENT.value, Role.PROCESS_SERVER.value):
            options += [f"--request-cert={tmp_path / caller / CREDENTIALS_FILE}"]
            unfit += f",{UNFIT_FOR_MEMBERS}"
        else:
            viewer = await server.operator_token(OperatorRole.VIEWER)
            token = server.admin_token if caller == "administrator" else viewer.secret_token
            options += ["--header", f"Authorization: Bearer {token}"]
        program = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", *options),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--exclude-checks", unfit, "--no-color"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(SECONDS_MAX):
            output, _ = await program.communicate()
        told = output.decode(errors="replace")
        assert program.returncode == 0, told
        assert "Tested:" in told
        async with server.operator() as operator:
            await operator.machines()  # it is well
