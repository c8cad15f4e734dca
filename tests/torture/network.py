"""Where the agent is, and how packets between it and the servers get lost: a network namespace behind a veth pair.

Invariant: partitions drop packets without a word to anybody, as a broken switch does, by a neighbour's wrong hardware
address; `mend` undoes all of them; `remove` leaves nothing behind.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from typing import Final

from tests.torture.power import run_tool

NAME_PREFIX: Final = "farpoint-torture-"
SUBNETS: Final = range(1, 255)
NOBODY: Final = "02:00:00:00:00:01"
"""A hardware address that no interface has."""


@dataclass(slots=True)
class Loopback:
    """No namespace: the servers' proxies on an address of their own, everything in one place."""

    config_host: str = "127.0.0.2"
    process_host: str = "127.0.0.2"
    agent_host: str = "127.0.0.1"
    agents_inside: tuple[str, ...] = ()

    def remove(self) -> None:
        return


@dataclass(slots=True)
class Namespace:
    """The agent's own network, 10.231.N.0/24, with the servers' proxies on the host's end of it."""

    number: int
    name: str = field(init=False)
    config_host: str = field(init=False)
    process_host: str = field(init=False)
    agent_host: str = field(init=False)
    agents_inside: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{NAME_PREFIX}{os.getpid()}-{self.number}"
        subnet = f"10.231.{self.number}"
        self.config_host, self.agent_host, self.process_host = f"{subnet}.1", f"{subnet}.2", f"{subnet}.3"
        # why: not by `ip netns exec`, which gives the program a copy of all mounts and so keeps them busy
        self.agents_inside = ("nsenter", f"--net=/run/netns/{self.name}", "--")
        self._make()

    @property
    def host_link(self) -> str:
        return f"fpt{self.number}h"

    @property
    def agent_link(self) -> str:
        return f"fpt{self.number}a"

    def lose_packets_to(self, *hosts: str) -> None:
        """What the agent sends to these addresses of the servers is lost; what they send to it arrives."""
        for host in hosts:
            self._inside("neigh", "replace", host, "lladdr", NOBODY, "nud", "permanent", "dev", self.agent_link)

    def lose_packets_to_agent(self) -> None:
        """What the servers send to the agent is lost; what it sends arrives."""
        run_tool(
            *("ip", "neigh", "replace", self.agent_host, "lladdr", NOBODY, "nud", "permanent", "dev", self.host_link)
        )

    def unplug(self) -> None:
        """Nothing passes, and both ends see that the link is down."""
        run_tool("ip", "link", "set", self.host_link, "down")

    def mend(self) -> None:
        run_tool("ip", "link", "set", self.host_link, "up")
        for prefix, link in ((("ip", "-n", self.name), self.agent_link), (("ip",), self.host_link)):
            run_tool(*prefix, "neigh", "flush", "nud", "permanent", "dev", link)

    def remove(self) -> None:
        # why: the pair goes with either end; the namespace itself only with its last process
        subprocess.run(["ip", "link", "delete", self.host_link], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    def _make(self) -> None:
        run_tool("ip", "netns", "add", self.name)
        try:
            run_tool(
                *("ip", "link", "add", self.host_link, "type", "veth"),
                *("peer", "name", self.agent_link, "netns", self.name),
            )
        except BaseException:
            # why: the link may be another's, who was faster
            run_tool("ip", "netns", "delete", self.name)
            raise
        try:
            for host in (self.config_host, self.process_host):
                run_tool("ip", "address", "add", f"{host}/24", "dev", self.host_link)
            self._inside("address", "add", f"{self.agent_host}/24", "dev", self.agent_link)
            self._inside("link", "set", "lo", "up")
            self._inside("link", "set", self.agent_link, "up")
            run_tool("ip", "link", "set", self.host_link, "up")
        except BaseException:
            self.remove()
            raise

    def _inside(self, *arguments: str) -> None:
        run_tool("ip", "-n", self.name, *arguments)


def free_namespace() -> Namespace:
    """One whose subnet nobody on this machine uses."""
    for number in SUBNETS:
        if f"10.231.{number}." in run_tool("ip", "-4", "address", "show"):
            continue
        try:
            return Namespace(number)
        except subprocess.CalledProcessError as error:
            if "File exists" not in str(error.stderr):
                raise
    raise RuntimeError("all subnets of 10.231.0.0/16 are in use")


def remove_namespaces_of(process_id: int) -> None:
    """All that this process left."""
    for line in run_tool("ip", "netns", "list").splitlines():
        name = line.split()[0] if line else ""
        if name.startswith(f"{NAME_PREFIX}{process_id}-"):
            subprocess.run(["ip", "link", "delete", f"fpt{name.rpartition('-')[2]}h"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
