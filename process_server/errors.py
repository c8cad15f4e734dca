"""What can go wrong in a process server beyond what the protocol and the store can name."""

from __future__ import annotations

from protocol.errors import LocalFault, PeerFault


class PositionOutOfOrder(LocalFault):
    """A position would fall or overtake another. Fields: epoch, received, durable, committed."""

    code = "position-out-of-order"
    message = "epoch {epoch}: received {received}, durable {durable}, committed {committed} are out of order"
    hint = "This is a defect of the process server; the disk stops, nothing acknowledged is lost. Please report it."


class CacheFault(LocalFault):
    """The cache's directory or a file in it. Fields: name, reason."""

    code = "cache-fault"
    message = "cache file {name}: {reason}"
    hint = "Check the cache's file system; acknowledged change sets that it lost are copied in again in a new epoch."


class CacheUnwritable(CacheFault):
    """No log file of the cache can be written or synchronized at present; nothing is acknowledged until one can."""

    code = "cache-unwritable"
    is_retryable = True
    message = "cache file {name} cannot be written: {reason}"


class CacheFull(CacheFault):
    """The cache's byte limit is reached; nothing more is taken until segments are committed."""

    code = "cache-full"
    is_retryable = True
    message = "no room in the cache for {name}: {reason}"
    hint = "The agents keep their backlog as extents. Check why uploads do not keep up, or give the cache more room."


class CacheDamaged(CacheFault):
    """Acknowledged bytes do not read back as written. Fields: name, reason."""

    code = "cache-damaged"
    message = "cache file {name} is damaged: {reason}"


class CacheFormatNotSupported(CacheFault):
    """Fields: name, version, supported."""

    code = "cache-format-not-supported"
    message = "cache file {name} has format version {version}; this program reads {supported}"
    hint = "Start the version that wrote it, let it upload everything, then upgrade."


class DiskTakenOver(PeerFault):
    """Another process server closed the epoch. Fields: disk, epoch, successor."""

    code = "disk-taken-over"
    message = "disk {disk}: epoch {epoch} was closed by process server {successor}"
    hint = "The agent is sent to the process server that holds the disk now."


class EpochNotCommitted(LocalFault):
    """A new epoch has to wait for what the old one ends with. Fields: disk, segments."""

    code = "epoch-not-committed"
    is_retryable = True
    message = "disk {disk}: {segments} segments of the old epoch are not in the store yet"
    hint = "The agent tries again by itself; check that the store can be reached."


class DiskNotReady(LocalFault):
    """Something happened to the disk while it was being opened. Fields: disk."""

    code = "disk-not-ready"
    is_retryable = True
    message = "disk {disk} is not ready"
    hint = "The agent tries again by itself; the process server's log says what happened."


class DiskStopped(LocalFault):
    """The disk's history may not be extended here any more. Fields: disk, reason_code, reason."""

    code = "disk-stopped"
    message = "disk {disk} is stopped here ({reason_code}): {reason}"
    hint = "See the disk's events on the configuration server; resynchronize it or move it to another process server."


class DiskOpenedElsewhere(PeerFault):
    """A newer connection of the same machine opened the disk. Fields: disk."""

    code = "disk-opened-elsewhere"
    message = "disk {disk} was opened again by a newer connection of its machine"


class ServiceStopping(LocalFault):
    """No more frames are taken; come back later."""

    code = "service-stopping"
    is_retryable = True
    message = "the process server is stopping"


class StoreNotSet(LocalFault):
    """The settings name no store."""

    code = "store-not-set"
    message = "the settings name no store"
    hint = "Set `store` to file:///absolute/path or azure://account/container/prefix."


class StateUnreadable(LocalFault):
    """Fields: name, reason."""

    code = "state-unreadable"
    message = "state file {name}: {reason}"
    hint = (
        "A latent error of the disk, another version, or somebody changed it; remove it, and the configuration server "
        "sends it again."
    )
