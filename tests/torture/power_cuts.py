"""Power cuts of any of the site's disks, alone or together, at a drawn instant of running replication.

What was acknowledged before the cut is known to an agent that did not notice; what was stated, to the operator.
"""

from __future__ import annotations

import time
from typing import Final

from tests.scenarios.processes import wait_until
from tests.scenarios.site import REPLICATION_SECONDS
from tests.torture.torment import Need, Torment
from tests.torture.tortured_site import DISK_NAMES

CUTS_MAX: Final = 2
SECONDS_BEFORE_MAX: Final = 1.5
SECONDS_AWAY_MAX: Final = 0.5


class PowerCuts(Torment):
    """One or two, while the source changes; the programs that were not hit go on."""

    kind = "power cut"
    needs = frozenset({Need.ROOT, Need.LOOP_DISKS})

    def arrange(self) -> str:
        self._cuts = []
        for _ in range(self.draw.randint(1, CUTS_MAX)):
            names = self.draw.choice(
                (
                    ("process-server",),
                    ("process-server",),
                    ("process-server", "store"),
                    ("process-server", "store"),
                    ("store",),
                    ("agent",),
                    ("config-server",),
                    DISK_NAMES,
                )
            )
            self._cuts.append((names, self.draw.uniform(0, SECONDS_BEFORE_MAX), self.draw.uniform(0, SECONDS_AWAY_MAX)))
        return ", then ".join(f"after {before:.2f} s {' + '.join(names)}" for names, before, _ in self._cuts)

    def run(self) -> None:
        with self.site.busy(self.draw):
            for names, before_seconds, away_seconds in self._cuts:
                self.site.start_what_ended()
                # why: a cut is to meet the work, and not only the way to it
                agent = self.site.agent
                wait_until("the agent is connected", agent.endpoint.is_ready, seconds=REPLICATION_SECONDS)
                time.sleep(before_seconds)
                self.site.look()
                self.site.cut_power(names)
                for name in names:
                    self.counts[f"power cut of {name} on {self.site.disks[name].file_system.name.lower()}"] += 1
                self.counts["power cut"] += 1
                time.sleep(away_seconds)
                self.site.look()
