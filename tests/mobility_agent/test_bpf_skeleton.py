"""The compiled tracing programs are those of the sources beside them, name nothing of the machine that made them, and
are packed so that nothing gets lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.compile_bpf import CLANG, SOURCES, compile_skeleton, missing_tools, parse_header
from mobility_agent.tracking.bpf_skeleton import SKELETON_FILE, Skeleton, shipped_skeleton
from tests.deploy.needed_tools import ROOT, not_here

BPF = ROOT / "mobility_agent" / "tracking" / "bpf"


def compiled(directory: Path) -> bytes:
    missing = missing_tools()
    if missing:
        not_here(f"{CLANG} and bpftool are not installed: apt-get install {' '.join(missing)}")
    return compile_skeleton(directory)


def test_the_committed_programs_are_made_of_the_committed_sources(tmp_path: Path) -> None:
    for name in SOURCES:
        shutil.copy(BPF / name, tmp_path / name)
    assert compiled(tmp_path) == (BPF / SKELETON_FILE).read_bytes(), "run `make bpf` and commit what it makes"


def test_another_source_makes_another_program(tmp_path: Path) -> None:
    for name in SOURCES:
        text = (BPF / name).read_text()
        (tmp_path / name).write_text(text.replace("#define DISKS_MAX 64", "#define DISKS_MAX 65"))
    assert compiled(tmp_path) != (BPF / SKELETON_FILE).read_bytes()


def test_nothing_of_a_machine_is_in_them() -> None:
    content = (BPF / SKELETON_FILE).read_bytes()
    for word in (b"/home", b"/tmp", b"/usr", b"/root", str(ROOT).encode()):
        assert word not in content


def test_they_are_licensed_both_ways() -> None:
    for name in SOURCES:
        assert "GPL-2.0-only OR BSD-2-Clause" in (BPF / name).read_text().splitlines()[0]
    assert b"Dual BSD/GPL" in shipped_skeleton()[0].data


def test_a_skeleton_is_unpacked_as_it_was_packed() -> None:
    skeleton = Skeleton(data=b"\0\1\xff", instructions=b"12345678", maps=("one", "two"), programs=("three",))
    assert Skeleton.unpacked(skeleton.packed()) == skeleton
    with pytest.raises(ValueError, match="format"):
        Skeleton.unpacked(b"\x95\x02" + skeleton.packed()[2:])


def test_bpftools_header_is_read_byte_for_byte() -> None:
    text = """
    struct { struct bpf_map_desc first; struct bpf_map_desc second; } maps;
    struct { struct bpf_prog_desc only; } progs;
	opts.data_sz = 4;
	opts.data = (void *)"\\
\\0\\x0a\\
\\x30\\0";
	opts.insns_sz = 1;
	opts.insns = (void *)"\\
\\xff";
"""
    skeleton = parse_header(text)
    assert (skeleton.data, skeleton.instructions) == (b"\0\n0\0", b"\xff")
    assert (skeleton.maps, skeleton.programs) == (("first", "second"), ("only",))
    with pytest.raises(ValueError, match="announced"):
        parse_header(text.replace("data_sz = 4", "data_sz = 5"))
