"""The cores, exhaustively where that is possible: the clock's spans, RPO, matching, grants, assignment, admission."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config_server.core.assignment import ProcessServerLoad, choose_process_server
from config_server.core.grants import missing_grants, wanted_epochs
from config_server.core.join_tokens import Admission, StoredJoinToken, decide_admission
from config_server.core.machine_descriptions import describe_machine
from config_server.core.registry import KnownDisk, is_same_disk, match_disk
from config_server.core.rpo import evaluate_rpo
from config_server.core.server_clock import (
    DRIFT_PER_MILLE_MAX,
    JUMP_TOLERANCE_NS,
    SPANS_MAX,
    ClockSpan,
    DatedInstant,
    ServerClockState,
    date_instant,
    observe_clock,
    start_clock,
)
from protocol.control import DiskIdentity, DiskKind, HostDescription, ImageFileIdentity
from protocol.control_errors import (
    DiskChanged,
    JoinTokenExpired,
    JoinTokenForAnotherRole,
    JoinTokenUsed,
    JoinTokenWrong,
    RequestInvalid,
)
from protocol.enrollment import EnrollmentRequest, make_signing_key, proof_key, prove, transcript
from protocol.errors import InvalidValue, NotPermitted
from protocol.operator_messages import RpoReason, RpoStatus
from protocol.vocabulary import EPOCH_MAX, DiskId, MachineId, ProcessServerId, Role
from tests.config_server.running import VAULT, disk_identity, image_identity, registration

SECOND = 10**9
START_NS = 1_800_000_000 * SECOND
THRESHOLD = 900.0


def clock_at(age_seconds: float, *, generation: int = 1) -> ServerClockState:
    """A clock that shows START_NS + age."""
    now_ns = START_NS + round(age_seconds * SECOND)
    spans = (ClockSpan(generation=generation, first_ns=min(START_NS, now_ns), last_ns=now_ns),)
    return ServerClockState(spans=spans, wall_ns=now_ns, monotonic_seconds=0.0)


RPO_TABLE = [
    # generation of the point, age of the point, what is said, why
    (1, 0.0, RpoStatus.OK, RpoReason.WITHIN_THRESHOLD),
    (1, 899.9, RpoStatus.OK, RpoReason.WITHIN_THRESHOLD),
    (1, 900.0, RpoStatus.OK, RpoReason.WITHIN_THRESHOLD),
    (1, 900.1, RpoStatus.MISSED, RpoReason.BEYOND_THRESHOLD),
    (1, 1e6, RpoStatus.MISSED, RpoReason.BEYOND_THRESHOLD),
    (1, -0.1, RpoStatus.UNKNOWN, RpoReason.INSTANT_IMPLAUSIBLE),
    (2, 0.0, RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED),
    (2, 1e6, RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED),
    (2, -1e3, RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED),
    (None, 0.0, RpoStatus.UNKNOWN, RpoReason.INSTANT_IMPLAUSIBLE),
    (None, 1e6, RpoStatus.UNKNOWN, RpoReason.INSTANT_IMPLAUSIBLE),
]


@pytest.mark.parametrize(("generation", "age_seconds", "status", "reason"), RPO_TABLE)
@pytest.mark.parametrize("heard_seconds_ago", [0.0, 1e6])
def test_rpo_is_the_age_of_the_newest_point_where_that_can_be_told(
    generation: int | None, age_seconds: float, status: RpoStatus, reason: RpoReason, heard_seconds_ago: float
) -> None:
    clock = clock_at(age_seconds)
    rpo = evaluate_rpo(
        clock,
        newest=DatedInstant(instant_ns=START_NS, generation=generation),
        heard_ns=clock.tick_ns - round(heard_seconds_ago * SECOND),
        threshold_seconds=THRESHOLD,
    )
    assert (rpo.status, rpo.reason) == (status, reason)
    assert (rpo.age_seconds is None) == (status is RpoStatus.UNKNOWN)


@pytest.mark.parametrize(
    ("heard_seconds_ago", "status", "reason"),
    [
        (0.0, RpoStatus.UNKNOWN, RpoReason.NO_POINT),
        (900.0, RpoStatus.UNKNOWN, RpoReason.NO_POINT),
        (900.1, RpoStatus.MISSED, RpoReason.SILENT),
        (-100.0, RpoStatus.UNKNOWN, RpoReason.NO_POINT),
    ],
)
def test_without_a_point_silence_is_a_breach_and_nothing_is_good(
    heard_seconds_ago: float, status: RpoStatus, reason: RpoReason
) -> None:
    clock = clock_at(0.0)
    heard_ns = clock.tick_ns - round(heard_seconds_ago * SECOND)
    rpo = evaluate_rpo(clock, newest=None, heard_ns=heard_ns, threshold_seconds=THRESHOLD)
    assert (rpo.status, rpo.reason, rpo.age_seconds) == (status, reason, None)


@given(
    generation=st.sampled_from([None, 1, 2]),
    age=st.integers(-(2**40), 2**40),
    threshold=st.floats(1, 1e6),
)
def test_good_is_said_only_of_a_point_of_this_clock_within_the_threshold(
    generation: int | None, age: int, threshold: float
) -> None:
    clock = clock_at(age / SECOND, generation=2)
    newest = DatedInstant(instant_ns=START_NS, generation=generation)
    rpo = evaluate_rpo(clock, newest=newest, heard_ns=clock.tick_ns, threshold_seconds=threshold)
    true_age = (clock.tick_ns - START_NS) / SECOND
    assert (rpo.status is RpoStatus.OK) == (generation == 2 and 0 <= true_age <= threshold)


def test_a_steady_clock_stays_in_one_span() -> None:
    state = start_clock((), START_NS, 100.0)
    for second in range(1, 1000):
        state = observe_clock(state, START_NS + second * SECOND + second * 400_000, 100.0 + second)
    assert state.generation == 1
    assert (state.present.first_ns, state.tick_ns) == (START_NS, START_NS + 999 * SECOND + 999 * 400_000)


@pytest.mark.parametrize("jump_seconds", [-86400, -60, -3, 3, 60, 86400])
def test_a_clock_that_is_set_begins_a_span(jump_seconds: int) -> None:
    state = start_clock((), START_NS, 0.0)
    state = observe_clock(state, START_NS + 5 * SECOND, 5.0)
    state = observe_clock(state, START_NS + (6 + jump_seconds) * SECOND, 6.0)
    assert state.generation == 2
    assert state.tick_ns == START_NS + (6 + jump_seconds) * SECOND
    state = observe_clock(state, START_NS + (7 + jump_seconds) * SECOND, 7.0)
    assert state.generation == 2


def test_a_clock_that_creeps_back_is_found_out_too_and_never_ticks_back_within_a_span() -> None:
    state = start_clock((), START_NS, 0.0)
    ticks = [state.tick_ns]
    for step in range(1, 60):
        state = observe_clock(state, START_NS - step * SECOND // 10, step * 0.01)
        if state.generation > 1:
            break
        ticks.append(state.tick_ns)
    assert state.generation == 2
    assert ticks == sorted(ticks)


def test_a_small_step_back_makes_no_point_look_younger_and_is_caught_up_with() -> None:
    """Simulation, seed 1343: ticks stood still until the clock caught up: ages were too good by the step."""
    behind_ns = -17 * SECOND // 10
    state = observe_clock(start_clock((), START_NS, 0.0), START_NS + behind_ns + 10 * SECOND, 10.0)
    assert START_NS + 10 * SECOND - SECOND // 100 <= state.tick_ns <= START_NS + 10 * SECOND
    for second in range(20, 2000, 10):
        state = observe_clock(state, START_NS + behind_ns + second * SECOND, float(second))
    assert state.generation == 1
    assert state.tick_ns == state.wall_ns


def test_small_steps_back_that_add_up_begin_a_span() -> None:
    state = start_clock((), START_NS, 0.0)
    for step in range(1, 3):
        state = observe_clock(state, START_NS + step * 10 * SECOND - step * 17 * SECOND // 10, step * 10.0)
    assert state.generation == 2
    assert state.tick_ns == state.wall_ns


@pytest.mark.parametrize(
    ("later_ns", "generation"),
    [(0, 1), (86400 * SECOND, 1), (-JUMP_TOLERANCE_NS, 1), (-JUMP_TOLERANCE_NS - 1, 2), (-86400 * SECOND, 2)],
)
def test_going_back_over_a_restart_begins_a_span(later_ns: int, generation: int) -> None:
    stored = (ClockSpan(generation=1, first_ns=START_NS - SECOND, last_ns=START_NS),)
    assert start_clock(stored, START_NS + later_ns, 0.0).generation == generation


def test_many_jumps_keep_the_spans_bounded_and_cover_all_that_was_shown() -> None:
    state = start_clock((), START_NS, 0.0)
    shown = [state.tick_ns]
    for jump in range(1, 4 * SPANS_MAX):
        state = observe_clock(state, START_NS + (-1) ** jump * jump * 3600 * SECOND, float(jump))
        shown.append(state.tick_ns)
    assert len(state.spans) == SPANS_MAX
    assert state.generation == 4 * SPANS_MAX
    for tick in shown:
        assert date_instant(tick, state.spans, None).generation is not None


def spans_after(jump_seconds: int) -> tuple[ClockSpan, ...]:
    """An hour, a jump, an hour."""
    begin = START_NS + (3600 + jump_seconds) * SECOND
    return (
        ClockSpan(generation=1, first_ns=START_NS, last_ns=START_NS + 3600 * SECOND),
        ClockSpan(generation=2, first_ns=begin, last_ns=begin + 3600 * SECOND),
    )


def test_after_a_jump_forward_every_instant_has_its_span() -> None:
    spans = spans_after(7200)
    assert date_instant(START_NS + SECOND, spans, None).generation == 1
    assert date_instant(spans[1].first_ns, spans, None).generation == 2
    assert date_instant(spans[0].last_ns + 1, spans, None).generation is None
    assert date_instant(spans[1].last_ns + 1, spans, None).generation is None


def test_after_a_jump_back_a_doubtful_instant_counts_as_old_until_it_is_proved_new() -> None:
    spans = spans_after(-1800)
    doubtful = spans[1].first_ns + 600 * SECOND
    assert date_instant(doubtful, spans, None).generation == 1
    earlier_old = DatedInstant(instant_ns=doubtful - SECOND, generation=1)
    assert date_instant(doubtful, spans, earlier_old).generation == 1
    later_old = DatedInstant(instant_ns=doubtful + SECOND, generation=1)
    assert date_instant(doubtful, spans, later_old).generation == 2
    after_new = DatedInstant(instant_ns=doubtful - SECOND, generation=2)
    assert date_instant(doubtful, spans, after_new).generation == 2
    assert date_instant(spans[0].last_ns + SECOND, spans, None).generation == 2


def test_what_a_process_server_went_on_telling_when_the_clock_was_set_back_is_not_taken_for_new() -> None:
    """Simulation, seed 169: told from the last answer, later than the last tick, and passed by the new span soon."""
    state = start_clock((), START_NS, 0.0)
    state = observe_clock(state, START_NS + 100 * SECOND, 100.0)
    state = observe_clock(state, START_NS + (102 - 3) * SECOND, 102.0)
    told = START_NS + 102 * SECOND
    state = observe_clock(state, START_NS + (130 - 3) * SECOND, 130.0)
    dated = date_instant(told, state.spans, None)
    assert dated.generation == 1
    rpo = evaluate_rpo(state, newest=dated, heard_ns=state.tick_ns, threshold_seconds=THRESHOLD)
    assert rpo.age_seconds is None


@settings(max_examples=300)
@given(data=st.data())
def test_a_stated_age_is_never_less_than_the_true_one(data: st.DataObject) -> None:
    """The clock is set at random; points are marked with true ticks and reported late, in order. Invariant 11."""
    state = start_clock((), START_NS, 0.0)
    elapsed = 0.0
    marks: list[tuple[float, int]] = []
    previous: DatedInstant | None = None
    offset = 0
    for _ in range(data.draw(st.integers(2, 12))):
        elapsed += data.draw(st.sampled_from([1.0, 300.0, 1000.0]))
        offset += data.draw(st.sampled_from([0, 0, -1, 1, -400, -1500, 700])) * SECOND
        state = observe_clock(state, START_NS + offset + round(elapsed * SECOND), elapsed)
        marks.append((elapsed, state.tick_ns))
        reported = data.draw(st.integers(0, len(marks) - 1))
        marked_at, instant_ns = marks[reported]
        marks = marks[reported:]
        dated = date_instant(instant_ns, state.spans, previous)
        previous = dated
        rpo = evaluate_rpo(state, newest=dated, heard_ns=state.tick_ns, threshold_seconds=THRESHOLD)
        assert dated.generation is not None
        if rpo.age_seconds is not None:
            tolerated = DRIFT_PER_MILLE_MAX / 1000 * (elapsed - marked_at) + 1e-6
            assert rpo.age_seconds >= elapsed - marked_at - tolerated


def test_a_span_runs_forwards() -> None:
    with pytest.raises(InvalidValue):
        ClockSpan(generation=1, first_ns=2, last_ns=1)


MACHINE = MachineId("1" * 32)
OTHER_MACHINE = MachineId("2" * 32)


def known(
    identity: DiskIdentity,
    *,
    disk: str = "a",
    machine: MachineId = MACHINE,
    path: str = "/dev/vda",
    protected: bool = True,
) -> KnownDisk:
    return KnownDisk(disk=DiskId(disk * 32), machine=machine, path=path, identity=identity, is_protected=protected)


def block(**marks: object) -> DiskIdentity:
    return DiskIdentity.model_validate(
        {"kind": DiskKind.BLOCK_DEVICE, "size_bytes": 2**30, "logical_sector_bytes": 512} | marks
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"wwn": "w"}, {"wwn": "w", "serial": "other"}, True),
        ({"wwn": "w", "serial": "s"}, {"wwn": "v", "serial": "s"}, False),
        ({"serial": "s", "partition_table": "p"}, {"serial": "s", "partition_table": "q"}, True),
        ({"serial": "s", "partition_table": "p"}, {"serial": "t", "partition_table": "p"}, False),
        ({"partition_table": "p"}, {"partition_table": "p", "serial": "s"}, True),
        ({"partition_table": "p", "file_systems": ("f",)}, {"partition_table": "q", "file_systems": ("f",)}, False),
        ({"file_systems": ("f", "g")}, {"file_systems": ("g", "h")}, True),
        ({"file_systems": ("f",)}, {"file_systems": ("h",)}, False),
        ({"wwn": "w"}, {"serial": "s"}, None),
        ({}, {}, None),
    ],
)
def test_the_strongest_common_mark_decides(one: dict[str, object], other: dict[str, object], same: bool | None) -> None:
    assert is_same_disk(block(**one), block(**other)) is same
    assert is_same_disk(block(**other), block(**one)) is same


def test_an_image_file_is_its_inode_and_generation() -> None:
    def image(inode: int, generation: int | None) -> DiskIdentity:
        file = ImageFileIdentity(file_system="fs", inode=inode, generation=generation)
        return image_identity(inode).model_copy(update={"image_file": file, "file_systems": ("same",)})

    assert is_same_disk(image(1, None), image(1, 5)) is True
    assert is_same_disk(image(1, 5), image(1, 5)) is True
    assert is_same_disk(image(1, 5), image(1, 6)) is False
    assert is_same_disk(image(1, 5), image(2, 5)) is False
    assert is_same_disk(image(1, 5), block(file_systems=("same",))) is False


def test_a_disk_without_marks_is_known_by_path_and_size() -> None:
    bare = disk_identity(None)
    assert match_disk(registration("/dev/loop0", bare), MACHINE, [known(bare, path="/dev/loop0")]) is not None
    assert match_disk(registration("/dev/loop1", bare), MACHINE, [known(bare, path="/dev/loop0")]) is None
    grown = disk_identity(None, size_bytes=2**31)
    assert match_disk(registration("/dev/loop0", grown), MACHINE, [known(bare, path="/dev/loop0")]) is None


def test_a_named_disk_must_be_ones_own_and_still_be_itself() -> None:
    ours, theirs = known(disk_identity("S1")), known(disk_identity("S1"), disk="b", machine=OTHER_MACHINE)
    for named in ("b" * 32, "c" * 32):
        with pytest.raises(NotPermitted):
            match_disk(registration(disk=named), MACHINE, [ours, theirs])
    with pytest.raises(DiskChanged):
        match_disk(registration(identity=disk_identity("S2"), disk="a" * 32), MACHINE, [ours])
    assert match_disk(registration(disk="a" * 32), MACHINE, [ours]) == ours
    bare = known(disk_identity(None), path="/dev/old")
    moved = registration("/dev/new", disk_identity(None), disk="a" * 32)
    assert match_disk(moved, MACHINE, [bare]) == bare


def test_another_machines_disk_with_the_same_serial_is_another_disk() -> None:
    theirs = known(disk_identity("S1"), disk="b", machine=OTHER_MACHINE)
    assert match_disk(registration(), MACHINE, [theirs]) is None


def test_a_protected_disk_goes_before_one_that_was_kept() -> None:
    kept = known(disk_identity("S1"), disk="a", protected=False)
    protected = known(disk_identity("S1"), disk="b")
    assert match_disk(registration(), MACHINE, [kept, protected]) == protected


@pytest.mark.parametrize("newest", [0, 1, 2, 7, EPOCH_MAX])
def test_the_epoch_in_use_and_one_spare_are_granted_once(newest: int) -> None:
    wanted = wanted_epochs(newest)
    assert wanted[0] == max(newest, 1)
    assert all(epoch <= EPOCH_MAX for epoch in wanted)
    for count in range(len(wanted) + 1):
        for granted in itertools.combinations(wanted, count):
            needs = missing_grants(newest, granted)
            assert {need.epoch for need in needs} == set(wanted) - set(granted)
            for need in needs:
                assert need.parent_epoch == need.epoch - 1
                assert need.is_spare == (need.epoch > wanted[0])


def test_the_least_loaded_process_server_that_is_heard_takes_a_machine() -> None:
    def load(name: str, disks: int, *, silent: bool = False) -> ProcessServerLoad:
        return ProcessServerLoad(process_server=ProcessServerId(name * 32), disks=disks, is_silent=silent)

    assert choose_process_server([]) is None
    assert choose_process_server([load("a", 3), load("b", 2)]) == "b" * 32
    assert choose_process_server([load("a", 3), load("b", 2, silent=True)]) == "a" * 32
    assert choose_process_server([load("b", 2), load("a", 2)]) == "a" * 32
    assert choose_process_server([load("b", 2, silent=True)]) == "b" * 32


SECRET, HASH = bytes(range(32)), bytes(32)


def request(role: Role = Role.AGENT, *, secret: bytes = SECRET, signs: bool | None = None) -> EnrollmentRequest:
    key = make_signing_key() if (signs if signs is not None else role is Role.PROCESS_SERVER) else None
    public = None if key is None else key.public_key().public_bytes_raw()
    statement = transcript(
        token="7" * 32, role=role, name="n", request_pem="p", signing_public_key=public, authority_key_hash=HASH
    )
    return EnrollmentRequest(
        token="7" * 32,
        role=role,
        name="n",
        request_pem="p",
        signing_public_key=public,
        signing_proof=None if key is None else key.sign(statement),
        proof=prove(proof_key(secret), statement),
    )


def token(role: Role = Role.AGENT, *, used_by: bytes | None = None) -> StoredJoinToken:
    return StoredJoinToken(token="7" * 32, role=role, proof_key=proof_key(SECRET), expires_ns=START_NS, used_by=used_by)


def decide(asked: EnrollmentRequest, stored: StoredJoinToken | None, *, now_ns: int = START_NS - 1) -> Admission:
    return decide_admission(asked, stored, authority_key_hash=HASH, now_ns=now_ns).admission


def test_a_token_admits_once_repeats_the_same_and_refuses_the_rest() -> None:
    asked = request()
    assert decide(asked, token()) is Admission.ADMIT
    used_by = decide_admission(asked, token(), authority_key_hash=HASH, now_ns=0).request_hash
    assert decide(asked, token(used_by=used_by)) is Admission.REPEAT
    assert decide(asked, token(used_by=used_by), now_ns=START_NS + 1) is Admission.REPEAT
    with pytest.raises(JoinTokenUsed):
        decide(asked.model_copy(), token(used_by=bytes(32)))
    with pytest.raises(JoinTokenExpired):
        decide(asked, token(), now_ns=START_NS)
    with pytest.raises(JoinTokenForAnotherRole):
        decide(asked, token(Role.RECOVERY_WORKER))


def test_nothing_is_told_about_a_token_whose_secret_is_not_proved() -> None:
    wrong = request(secret=bytes(32))
    for stored in (None, token(), token(Role.RECOVERY_WORKER), token(used_by=bytes(32))):
        with pytest.raises(JoinTokenWrong):
            decide(wrong, stored, now_ns=START_NS + 1)


@pytest.mark.parametrize("field", ["name", "request_pem", "signing_public_key", "role"])
def test_a_proof_is_good_for_its_own_request_only(field: str) -> None:
    asked = request(Role.PROCESS_SERVER)
    other = {"name": "m", "request_pem": "q", "signing_public_key": bytes(32), "role": Role.AGENT}[field]
    with pytest.raises(JoinTokenWrong):
        decide(asked.model_copy(update={field: other}), token(Role.PROCESS_SERVER))


def test_only_a_process_server_has_a_signing_key_and_proves_it() -> None:
    assert decide(request(Role.PROCESS_SERVER), token(Role.PROCESS_SERVER)) is Admission.ADMIT
    for asked, stored in (
        (request(Role.PROCESS_SERVER, signs=False), token(Role.PROCESS_SERVER)),
        (request(Role.PROCESS_SERVER).model_copy(update={"signing_proof": bytes(64)}), token(Role.PROCESS_SERVER)),
        (request(Role.AGENT, signs=True), token(Role.AGENT)),
    ):
        with pytest.raises(RequestInvalid):
            decide(asked, stored)


def test_a_description_survives_unprintable_and_overlong_names() -> None:
    host = HostDescription(name="a\nb" + "x" * 252, processors=1, memory_bytes=0, firmware="bios")
    disk = known(disk_identity(), path="/" + "d" * 400 + "/end\t")
    gone = known(disk_identity("S2"), disk="b", protected=False)
    described = describe_machine(host, [gone, disk], vault=VAULT, machine=MACHINE, version=1)
    assert described.name.startswith("a?b")
    assert described.memory_bytes is None
    assert [one.disk for one in described.disks] == [disk.disk]
    assert described.disks[0].name.endswith("/end?")
