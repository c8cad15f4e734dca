"""What a replication policy, or else the server's settings, say of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.operator_messages import PolicyTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds. freeze and application: 0 is never."""

    rpo_threshold_seconds: float
    copy_interval_seconds: float
    point_interval_seconds: float
    freeze_interval_seconds: float
    application_interval_seconds: float

    @staticmethod
    def of(policy: PolicyTerms) -> Terms:
        return Terms(
            rpo_threshold_seconds=policy.rpo_threshold_seconds,
            copy_interval_seconds=policy.copy_interval_seconds,
            point_interval_seconds=policy.point_interval_seconds,
            freeze_interval_seconds=policy.freeze_interval_seconds,
            application_interval_seconds=policy.application_interval_seconds,
        )
