"""What the doctor says: each thing that is amiss once, with what to do, and nothing where all is well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobility_agent.__main__ import main
from mobility_agent.core.checkup import (
    LOCKED_BYTES_MIN,
    UNFREEZABLE_KINDS,
    DiskFacts,
    Finding,
    MachineFacts,
    Weight,
    check_disk,
    check_machine,
)
from mobility_agent.core.tracking_choice import SourceChoice
from runtime.exit_codes import ExitCode

WELL = MachineFacts(is_enrolled=True, is_running=True, may_freeze=True, locked_bytes_max=None, scripts=["postgresql"])
TRACKED = SourceChoice(source="bitmap", reasons=())
SCANNED = SourceChoice(source="scan", reasons=("it is a partition", "the kernel is old"))
LIVE = DiskFacts(path="/dev/sda", is_protected=True, choice=TRACKED, source_in_use="bitmap", rounds=9, points=3)


def weights(findings: list[Finding]) -> list[Weight]:
    return [finding.weight for finding in findings]


def test_nothing_is_amiss_where_all_is_well() -> None:
    assert weights(check_machine(WELL)) == [Weight.OK]
    assert weights(check_disk(LIVE)) == [Weight.OK]


@pytest.mark.parametrize(
    ("change", "weight", "about"),
    [
        ({"is_enrolled": False}, Weight.PROBLEM, "enrolment"),
        ({"is_running": False}, Weight.PROBLEM, "agent"),
        ({"may_freeze": False}, Weight.NOTICE, "freeze"),
        ({"locked_bytes_max": LOCKED_BYTES_MIN - 1}, Weight.NOTICE, "freeze"),
        ({"script_fault": "others may write"}, Weight.PROBLEM, "scripts"),
        ({"scripts": []}, Weight.NOTICE, "scripts"),
    ],
)
def test_each_thing_that_a_machine_lacks_is_told_once(change: dict[str, object], weight: Weight, about: str) -> None:
    (finding,) = check_machine(replace(WELL, **change))  # type: ignore[arg-type]
    assert (finding.weight, finding.about) == (weight, about)
    assert finding.text
    assert finding.advice


def test_every_reason_against_a_better_source_is_told() -> None:
    facts = replace(LIVE, choice=SCANNED, source_in_use="")
    texts = [finding.text for finding in check_disk(facts)]
    assert texts[0].startswith("source scan would be used")
    assert texts[1:] == ["no better source: it is a partition", "no better source: the kernel is old"]
    refused = check_disk(replace(facts, choice=replace(SCANNED, is_refused=True)))
    assert weights(refused) == [Weight.OK, Weight.PROBLEM, Weight.PROBLEM]


def test_what_the_running_agent_says_counts_more_than_what_this_process_may() -> None:
    lesser = replace(LIVE, choice=SCANNED)
    assert weights(check_disk(lesser)) == [Weight.OK]
    better = check_disk(replace(LIVE, source_in_use="scan", reason_in_use="it was busy"))
    assert [finding.text for finding in better[1:]] == [
        "no better source: it was busy",
        "bitmap is possible now, and scan is in use",
    ]


@pytest.mark.parametrize("kind", UNFREEZABLE_KINDS)
def test_what_cannot_be_frozen_is_told(kind: str) -> None:
    findings = check_disk(replace(LIVE, file_systems=[("/", "ext4"), ("/boot/efi", kind)]))
    assert weights(findings) == [Weight.OK, Weight.NOTICE]
    assert "/boot/efi" in findings[1].text


@pytest.mark.parametrize(
    ("change", "weight", "part"),
    [
        ({"is_protected": False}, Weight.NOTICE, "not protected"),
        ({"held_elsewhere": ["sda3"]}, Weight.NOTICE, "sda3"),
        ({"error": "a read failed", "hint": "look at the disk"}, Weight.PROBLEM, "a read failed"),
        ({"is_disconnected": True}, Weight.PROBLEM, "no connection"),
        ({"points": 0, "unsettled_reason": "busy"}, Weight.PROBLEM, "no recovery point in 9 rounds"),
        ({"settled_seconds_ago": 9999.0, "unsettled_reason": "busy"}, Weight.PROBLEM, "for 9999 s: busy"),
        ({"freeze_fault": "a script failed"}, Weight.NOTICE, "a script failed"),
        ({"audit_alarms": 2}, Weight.NOTICE, "2 times"),
        ({"resyncs": 1}, Weight.NOTICE, "1 times"),
    ],
)
def test_each_thing_that_is_amiss_with_a_disk_is_told_once(
    change: dict[str, object], weight: Weight, part: str
) -> None:
    found = [finding for finding in check_disk(replace(LIVE, **change)) if finding.weight is not Weight.OK]  # type: ignore[arg-type]
    assert [finding.weight for finding in found] == [weight]
    assert part in found[0].text


def test_a_disk_that_cannot_be_opened_has_no_other_findings() -> None:
    assert weights(check_disk(replace(LIVE, fault="it is gone"))) == [Weight.PROBLEM]


def test_the_command_says_what_is_missing_on_a_machine_that_is_not_enrolled(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2**20))
    done = CliRunner().invoke(main, ["doctor", "--dir", str(tmp_path / "none"), "-o", "json", str(image)])
    assert done.exit_code == ExitCode.PARTIAL
    found = {(row["about"], row["weight"]) for row in json.loads(done.stdout)}
    assert {("enrolment", "problem"), (str(image), "ok"), (str(image), "notice")} <= found
