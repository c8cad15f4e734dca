"""What can go wrong on a source machine: faults of one disk stop that disk, never the others."""

from __future__ import annotations

from protocol.errors import LocalFault, RefusedByPeer, ReplicationError


class DiskFault(LocalFault):
    """One disk cannot be replicated as it is now. Fields: path."""

    code = "disk-fault"


class DiskVanished(DiskFault):
    """Nothing is at the path, or the device is gone. Fields: path, reason."""

    code = "disk-vanished"
    message = "disk {path} is gone: {reason}"
    hint = "Bring the disk back, or end its protection with `mobility-agent unprotect`."


class DiskReplaced(DiskFault):
    """The path leads to another disk. Fields: path, expected, found."""

    code = "disk-replaced"
    message = "{path} is another disk: expected {expected}, found {found}"
    hint = "Protect the new disk under its own name; unprotect the old one (--keep keeps its recovery points)."


class DiskResized(DiskFault):
    """Fields: path, expected_bytes, found_bytes."""

    code = "disk-resized"
    message = "disk {path} had {expected_bytes} bytes and now has {found_bytes}"
    hint = "A resized disk is protected anew: `mobility-agent unprotect --keep PATH`, then `protect PATH`."


class DiskUnreadable(DiskFault):
    """A read failed. Fields: path, offset_bytes, reason. Retryable: the pass is begun again."""

    code = "disk-unreadable"
    is_retryable = True
    message = "disk {path}: reading at {offset_bytes} failed: {reason}"
    hint = "Check the disk's health; blocks that cannot be read cannot be protected."


class DiskNotSupported(DiskFault):
    """Fields: path, reason."""

    code = "disk-not-supported"
    message = "{path} cannot be protected: {reason}"


class DiskPermissionDenied(DiskFault):
    """Fields: path."""

    code = "disk-permission-denied"
    message = "no permission to read {path}"
    hint = "Run the agent as root, or as the owner of the image file."


class NotProvedStill(LocalFault):
    """The disk cannot be proved still, so what is read of it is fuzzy. Fields: reason."""

    code = "not-proved-still"
    is_retryable = True
    message = "cannot prove the disk still: {reason}"


class ResyncNeeded(LocalFault):
    """A change source lost track: everything must be compared again. Fields: cause (core.resync_cause)."""

    code = "resync-needed"
    is_retryable = True
    message = "resynchronization needed: {cause}"


class FreezeFailed(LocalFault):
    """The machine's file systems could not be held still for a moment. Fields: reason."""

    code = "freeze-failed"
    is_retryable = True
    message = "no freeze: {reason}"
    hint = "`mobility-agent doctor` says what stands in the way; what another program has frozen it has to thaw first."


class ScriptFailed(LocalFault):
    """A script around a freeze did not succeed. Fields: script, reason."""

    code = "script-failed"
    is_retryable = True
    message = "script {script}: {reason}"
    hint = "Run it by hand with `freeze` and then `thaw`; the agent's log has what it wrote."


class AgentStateDamaged(LocalFault):
    """The agent's own state cannot be read or written. Fields: name, reason."""

    code = "agent-state-damaged"
    message = "agent state {name}: {reason}"
    hint = "Check space and health of the state directory's file system. Nothing that was acknowledged is lost."


class AgentNotRunning(LocalFault):
    """Fields: directory."""

    code = "agent-not-running"
    message = "no agent answers in {directory}"
    hint = "Start it with `mobility-agent run`."


class AgentTooBusy(LocalFault):
    """It listens, and has not answered in time. Fields: directory, command."""

    code = "agent-too-busy"
    is_retryable = True
    message = "the agent in {directory} has not answered {command} yet; it may still be at it"
    hint = "`mobility-agent status` shows what it does, and its newest freeze; the log says why it takes long."


class CacheLost(ReplicationError):
    """The process server knows less than it acknowledged: a new epoch. Fields: disk, acknowledged, durable."""

    code = "cache-lost"
    is_retryable = True
    message = "disk {disk}: {acknowledged} was acknowledged but only {durable} is durable; continuing in a new epoch"


class NotProtected(LocalFault):
    """Fields: path."""

    code = "not-protected"
    message = "{path} is not protected"
    hint = "`mobility-agent status` lists what is."


class AlreadyProtected(LocalFault):
    """Two paths lead to one disk. Fields: path, other."""

    code = "already-protected"
    message = "{path} is the disk that is protected as {other}"


class TooManyDisks(LocalFault):
    """Fields: limit."""

    code = "too-many-disks"
    message = "one machine has at most {limit} protected disks"


class DefectMet(LocalFault):
    """Something went wrong that the program has no name for. Fields: reason."""

    code = "defect-met"
    message = "a defect in Farpoint was met: {reason}"
    hint = "Report it with the agent's log."


class RefusedByAgent(RefusedByPeer):
    """The running agent did not do what the command line asked. Fields: peer_code, detail, retryable, agent_hint."""

    message = "{detail}"

    @property
    def hint(self) -> str:  # type: ignore[override]
        return str(self.fields["agent_hint"])
