"""What can go wrong with a vault: the store itself (`StoreFault`), or what lies in it (`VaultFault`)."""

from __future__ import annotations

from protocol.errors import LocalFault, ReplicationError


class StoreFault(ReplicationError):
    """The object store did not do what it was asked. Fields: url, reason (and name where an object is meant)."""

    code = "store-fault"
    message = "store {url}: {reason}"


class StoreUnavailable(StoreFault):
    """Not reachable, busy, or timed out. retry_after_seconds, where there is such a field: what a busy store asks for;
    0 if it asks for nothing.
    """

    code = "store-unavailable"
    is_retryable = True
    hint = "Replication goes on into the cache meanwhile; check the network and the store's health."


class StoreOutcomeUnknown(StoreUnavailable):
    """The reply to a create was lost: the object may be there. Compare trailers."""

    code = "store-outcome-unknown"


class ObjectUnreadable(StoreUnavailable):
    """The object is there, the medium under it fails. Fields: url, name, reason."""

    code = "object-unreadable"
    message = "store {url}: {name} cannot be read: {reason}"
    hint = "The medium of the store fails there; save what it still gives, and check it."


class StoreMissing(StoreFault):
    """The directory or container of the URL does not exist."""

    code = "store-missing"
    hint = "Check the URL; `farpoint vault init` makes a new vault in a store that exists."


class StoreNotPermitted(StoreFault):
    """The credential may not do this, or the store is read-only."""

    code = "store-not-permitted"
    hint = (
        "A process server needs the right to create, read and list, recovery to read and list. "
        "The store's network rules may also keep this machine out."
    )


class StoreCredentialRefused(StoreNotPermitted):
    """The store does not take the credential itself: wrong, ended, or for another store."""

    code = "store-credential-refused"
    hint = (
        "Check the key or the shared access signature: its account, its container, when it begins and ends; "
        "and this machine's clock. A signature in a file may be replaced while programs run; a key may not."
    )


class StoreFull(StoreFault):
    """No space, or over quota."""

    code = "store-full"
    is_retryable = True
    hint = "Free or add space; nothing acknowledged is lost while the cache holds it."


class ObjectExists(StoreFault):
    """The name is taken. Fields: url, name."""

    code = "object-exists"
    message = "store {url}: {name} exists"


class ObjectNotFound(StoreFault):
    """Fields: url, name."""

    code = "object-not-found"
    message = "store {url}: no object {name}"


class StoreUrlInvalid(LocalFault):
    """Fields: url, reason."""

    code = "store-url-invalid"
    message = "store URL {url!r}: {reason}"
    hint = "Use file:///absolute/path or azure://account/container/prefix."


class VaultFault(ReplicationError):
    """What lies in the store is not a vault's honest history."""

    code = "vault-fault"


class ObjectCorrupt(VaultFault):
    """Bytes that were signed or sealed otherwise. Fields: name, reason."""

    code = "object-corrupt"
    message = "{name} is damaged or forged: {reason}"
    hint = "Points before it are not affected; list them with `farpoint points --store URL --recovery-key FILE`."


class SegmentMissing(VaultFault):
    """Fields: name."""

    code = "segment-missing"
    message = "{name} is missing, but later segments are there"
    hint = "Points before it are not affected; list them with `farpoint points --store URL --recovery-key FILE`."


class SegmentAwaited(SegmentMissing):
    """A gap that uploads under way explain. Nothing behind it is committed. Fields: name."""

    code = "segment-awaited"
    message = "{name} is not there yet, but later segments are: an upload is under way, or was when its server stopped"
    hint = "Points before it are not affected. If no process server writes to this store any more, the segment is lost."


class HistoryForked(VaultFault):
    """Another object lies where ours belongs: somebody else extends this history. Fields: name."""

    code = "history-forked"
    message = (
        "{name} holds another segment than the one to be written there; this process server no longer owns the epoch"
    )
    hint = "Another process server has taken the disk over. This one stops extending it."


class FormatNotSupported(VaultFault):
    """Fields: name, version, supported."""

    code = "format-not-supported"
    message = "{name} has format version {version}; this program reads up to {supported}"
    hint = "Use a newer Farpoint."


class NotAVault(VaultFault):
    """Fields: url, reason."""

    code = "not-a-vault"
    message = "{url} holds no vault of this recovery key: {reason}"
    hint = "Check the store URL and that the recovery key file belongs to this vault."


class WrongRecoveryKey(VaultFault):
    """Fields: path, reason."""

    code = "wrong-recovery-key"
    message = "recovery key {path}: {reason}"
    hint = "Use one of the key files that `farpoint vault init` wrote for this vault."


class PositionNotFound(VaultFault):
    """The trusted part of the history does not reach so far. Fields: disk, position."""

    code = "position-not-found"
    message = "disk {disk} has no position {position} in storage"
    hint = "List what can be recovered with `farpoint points --store URL --recovery-key FILE`."
