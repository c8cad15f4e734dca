"""What there is to install, and what each program is made of.

Invariant: a program's packages and extras are what it imports, and nothing more; tests/deploy holds them against the
code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One installable program.

    name: of its package without `farpoint-`, of its directories and of its service. command: what is put on the path.
    packages: the import packages of ours that it holds. extras: of the wheel. user: of its service; "" where it has
    none of its own. further_units: what it needs at other times than its service runs. documents: of docs/, beside
    those that all have. examples: folders of deploy/ for operators to choose from.
    """

    name: str
    command: str
    module: str
    packages: tuple[str, ...]
    extras: tuple[str, ...]
    has_service: bool
    user: str
    summary: str
    description: str
    further_units: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    @property
    def package_name(self) -> str:
        return f"farpoint-{self.name}"

    @property
    def unit(self) -> str:
        return f"farpoint-{self.name}.service"

    @property
    def units(self) -> tuple[str, ...]:
        return (self.unit, *self.further_units) if self.has_service else ()


PROGRAMS: Final = (
    Program(
        name="mobility-agent",
        command="mobility-agent",
        module="mobility_agent",
        packages=("protocol", "runtime", "mobility_agent"),
        extras=("agent",),
        has_service=True,
        user="",
        summary="Farpoint's mobility agent: replicates this machine's disks",
        description="Runs on a machine that is protected, and sends its disks' changes to a process server.",
        further_units=("farpoint-mobility-agent-begin.service", "farpoint-mobility-agent-stop.service"),
        documents=("application-points.md",),
        examples=("scripts.d",),
    ),
    Program(
        name="process-server",
        command="process-server",
        module="process_server",
        packages=("protocol", "runtime", "storage", "process_server"),
        extras=("process-server",),
        has_service=True,
        user="farpoint-process-server",
        summary="Farpoint's process server: seals, caches and uploads changes",
        description="Takes mobility agents' changes, encrypts and caches them on disk, and uploads them to the store.",
    ),
    Program(
        name="config-server",
        command="config-server",
        module="config_server",
        packages=("protocol", "runtime", "config_server"),
        extras=("config-server",),
        has_service=True,
        user="farpoint-config-server",
        summary="Farpoint's configuration server: enrolment, certificates, RPO",
        description="Enrols agents and process servers, and knows what is protected and how far behind it is.",
    ),
    Program(
        name="recovery",
        command="farpoint",
        module="farpoint",
        packages=(
            "protocol",
            "runtime",
            "storage",
            "mobility_agent",
            "process_server",
            "config_server",
            "recovery",
            "farpoint",
        ),
        extras=("agent", "process-server", "config-server", "recovery"),
        has_service=False,
        user="",
        summary="Farpoint's recovery and operator's command line",
        description="Recovers disks from a store and a recovery key file alone; makes vaults and join tokens,\n"
        " lists what is protected, runs both servers on one host (farpoint up) and the demonstration (farpoint demo).",
    ),
)
