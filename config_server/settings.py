"""What an operator may set for the configuration server."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, field_validator

from protocol.enrollment import LEAF_LIFETIME
from runtime.logs import LogSettings
from runtime.observability import ListenAddress, ObservabilitySettings
from runtime.settings import Settings
from runtime.units import Seconds

DEFAULT_PORT: Final = 8443
DEFAULT_OBSERVABILITY_ADDRESS: Final = "127.0.0.1:9466"
SERVER_NAMES_MAX: Final = 64
RENEW_AFTER_SECONDS_MAX: Final = LEAF_LIFETIME.total_seconds() / 2
"""The rest of a certificate's life is for outages."""
INTERVAL_SECONDS_MIN: Final = 0.01
INTERVAL_SECONDS_MAX: Final = 31 * 86400.0
"""What the control plane's messages can carry."""
_ALL_INTERFACES: Final = ("0.0.0.0", "::")  # nosec B104 # noqa: S104

Interval = Annotated[Seconds, Field(ge=INTERVAL_SECONDS_MIN, le=INTERVAL_SECONDS_MAX)]
IntervalOrNever = Annotated[Seconds, Field(ge=0.0, le=INTERVAL_SECONDS_MAX)]


class ConfigServerSettings(Settings):
    """Seconds where the name says so. Everything has a default but the state directory."""

    state_directory: Path = Path("/var/lib/farpoint/config-server")
    listen: str = f"{_ALL_INTERFACES[0]}:{DEFAULT_PORT}"
    server_names: Annotated[tuple[str, ...], Field(max_length=SERVER_NAMES_MAX)] = ()
    """Names and addresses by which others reach this server, beside localhost and this host's name."""
    heartbeat_seconds: Interval = 10.0
    rpo_threshold_seconds: Interval = 900.0
    copy_interval_seconds: Interval = 60.0
    point_interval_seconds: Interval = 300.0
    freeze_interval_seconds: IntervalOrNever = 300.0
    """A live disk of which no round has settled for so long makes its machine's file systems be frozen for a moment;
    0: never."""
    application_interval_seconds: IntervalOrNever = 3600.0
    """How often machines that have scripts for it mark application-consistent points; 0: never."""
    renew_after_seconds: Annotated[Seconds, Field(ge=INTERVAL_SECONDS_MIN, le=RENEW_AFTER_SECONDS_MAX)] = 86400.0
    """The age at which members and this server itself renew their certificates."""
    log: LogSettings = LogSettings()
    observability: ObservabilitySettings = ObservabilitySettings(address=DEFAULT_OBSERVABILITY_ADDRESS)

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        ListenAddress.parse(value)
        return value

    def all_server_names(self) -> tuple[str, ...]:
        """For the server's certificate, each once."""
        host = ListenAddress.parse(self.listen).host
        own = () if host in _ALL_INTERFACES else (host,)
        names = ("localhost", "127.0.0.1", "::1", socket.gethostname(), *own, *self.server_names)
        return tuple(dict.fromkeys(names))
