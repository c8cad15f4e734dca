"""The network between the agent and the servers loses packets, one way or both, or its cable is pulled."""

from __future__ import annotations

import time
from typing import Final

from tests.torture.network import Namespace
from tests.torture.torment import Need, Torment

SECONDS_MIN: Final = 0.5
SECONDS_MAX: Final = 4.0
LONG_SHARE: Final = 0.15


class Partition(Torment):
    """One kind of loss for a while; sometimes for as long as a torment may last."""

    kind = "partition"
    needs = frozenset({Need.ROOT, Need.NAMESPACES})

    def arrange(self) -> str:
        self._how = self.draw.choice(
            ("the process server is lost to the agent", "all servers are lost to the agent",
             "the agent is lost to all servers", "the cable is pulled")
        )  # fmt: skip
        self._seconds = self.draw.uniform(SECONDS_MIN, SECONDS_MAX)
        if self.draw.random() < LONG_SHARE:
            self._seconds = max(self._seconds, self.draw.uniform(self.seconds_max / 2, self.seconds_max))
        return f"{self._how} for {self._seconds:.1f} s"

    def run(self) -> None:
        network = self.site.network
        assert isinstance(network, Namespace)
        with self.site.busy(self.draw):
            try:
                if self._how.startswith("the process server"):
                    network.lose_packets_to(network.process_host)
                elif self._how.startswith("all servers"):
                    network.lose_packets_to(network.process_host, network.config_host)
                elif self._how.startswith("the agent"):
                    network.lose_packets_to_agent()
                else:
                    network.unplug()
                time.sleep(self._seconds)
            finally:
                network.mend()
        self.counts["partition"] += 1
        if self._seconds > SECONDS_MAX:
            self.counts["long partition"] += 1
