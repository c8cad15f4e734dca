"""Sites for the scenarios: one of its own for a test that breaks things, one for a whole module that only looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.vocabulary import DiskId
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.site import Agent, Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Servers without any agent."""
    with Site(tmp_path) as made:
        yield made


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedSite:
    """A site with one small disk and two recovery points of it; older is of its first version."""

    site: Site
    agent: Agent
    source: SourceDisk
    disk: DiskId
    older: str
    newer: str


def replicate_two_points(site: Site) -> ReplicatedSite:
    agent = site.agent()
    source = SourceDisk(site.root / "source.img", size_bytes=12 * MEBIBYTE, seed=1)
    (disk,) = agent.protect(source)
    older = site.wait_for_point(disk, after_ns=source.changed_ns)
    source.change()
    newer = site.wait_for_point(disk, after_ns=source.changed_ns)
    return ReplicatedSite(site=site, agent=agent, source=source, disk=disk, older=older, newer=newer)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedSite]:
    """For tests that change nothing that another needs. All servers run."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield replicate_two_points(site)
