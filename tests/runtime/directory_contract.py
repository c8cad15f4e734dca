"""What every `DurableDirectory` does, whether its disk is real or simulated. Subclass it with a `directory` fixture.

What survives a loss of power is not asked here: only a directory that can lose it (the simulation's) can answer.
"""

from __future__ import annotations

import mmap

import pytest

from runtime.directory import DurableDirectory

ALIGNMENT = 4096


def aligned(fill: bytes, blocks: int = 1) -> memoryview:
    """A page-aligned buffer of `blocks` × 4096 bytes, as direct I/O asks for."""
    buffer = mmap.mmap(-1, blocks * ALIGNMENT)
    buffer.write(fill * (blocks * ALIGNMENT))
    return memoryview(buffer)


class DurableDirectoryContract:
    """The suite. Test classes inherit it and define the fixture `directory`: an empty DurableDirectory."""

    def test_an_empty_directory_has_no_names(self, directory: DurableDirectory) -> None:
        assert directory.names() == []

    def test_a_replaced_file_reads_as_its_newest_contents(self, directory: DurableDirectory) -> None:
        directory.replace("state", b"first, and longer")
        directory.replace("state", b"second")
        assert directory.read("state") == b"second"
        assert directory.names() == ["state"]

    def test_a_file_can_be_replaced_by_nothing(self, directory: DurableDirectory) -> None:
        directory.replace("state", b"")
        assert directory.read("state") == b""

    def test_names_come_sorted(self, directory: DurableDirectory) -> None:
        for name in ("b", "a.log", "B", "10", "9"):
            directory.replace(name, b"")
        assert directory.names() == ["10", "9", "B", "a.log", "b"]

    def test_reading_what_is_not_there_fails(self, directory: DurableDirectory) -> None:
        with pytest.raises(FileNotFoundError):
            directory.read("missing")
        with pytest.raises(FileNotFoundError):
            directory.open("missing")

    def test_creating_what_is_there_fails_and_leaves_it(self, directory: DurableDirectory) -> None:
        directory.replace("log", b"kept")
        with pytest.raises(FileExistsError):
            directory.open("log", create=True)
        assert directory.read("log") == b"kept"

    def test_a_removed_name_is_gone_and_removing_it_again_is_no_error(self, directory: DurableDirectory) -> None:
        directory.replace("log", b"x")
        directory.remove("log")
        directory.remove("log")
        assert directory.names() == []

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/etc", "a\0b"])
    def test_a_name_that_is_no_flat_file_name_is_refused(self, directory: DurableDirectory, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            directory.replace(name, b"x")
        with pytest.raises(ValueError, match="name"):
            directory.open(name, create=True)
        with pytest.raises(ValueError, match="name"):
            directory.read(name)
        with pytest.raises(ValueError, match="name"):
            directory.remove(name)

    def test_many_buffers_are_written_one_behind_the_other(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        buffers = [bytes([number % 251]) * (number % 7) for number in range(2500)]
        file.write(0, [b"head", *buffers])
        file.synchronize()
        file.close()
        assert directory.read("log") == b"head" + b"".join(buffers)

    def test_a_write_within_a_file_changes_only_its_range(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.write(0, [b"0123456789"])
        file.write(3, [b"ab", bytearray(b"c")])
        assert file.size_bytes() == 10
        file.close()
        assert directory.read("log") == b"012abc6789"

    def test_a_write_beyond_the_end_leaves_zeroes_between(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.write(4, [b"x"])
        file.close()
        assert directory.read("log") == b"\0\0\0\0x"

    def test_reading_stops_at_the_end_of_the_file(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.write(0, [b"0123456789"])
        buffer = bytearray(b"." * 8)
        assert file.read_into(6, buffer) == 4
        assert buffer == b"6789...."
        assert file.read_into(10, buffer) == 0
        assert file.read_into(100, buffer) == 0
        assert file.read_into(2, memoryview(buffer)[:3]) == 3
        assert buffer == b"2349...."
        file.close()

    def test_a_preallocated_file_has_its_size_and_reads_as_zeroes(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True, preallocate_bytes=3 * ALIGNMENT)
        assert file.size_bytes() == 3 * ALIGNMENT
        file.write(ALIGNMENT, [b"x"])
        buffer = bytearray(b"." * 3 * ALIGNMENT)
        assert file.read_into(0, buffer) == 3 * ALIGNMENT
        assert bytes(buffer) == bytes(ALIGNMENT) + b"x" + bytes(2 * ALIGNMENT - 1)
        file.close()

    def test_truncating_cuts_and_extends(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.write(0, [b"0123456789"])
        file.truncate(4)
        assert file.size_bytes() == 4
        file.truncate(6)
        file.close()
        assert directory.read("log") == b"0123\0\0"

    def test_an_existing_file_opens_with_its_contents(self, directory: DurableDirectory) -> None:
        directory.replace("log", b"there")
        file = directory.open("log")
        file.write(5, [b" it is"])
        file.close()
        assert directory.read("log") == b"there it is"

    def test_two_openings_of_a_file_see_each_others_writes(self, directory: DurableDirectory) -> None:
        writer = directory.open("log", create=True)
        reader = directory.open("log")
        writer.write(0, [b"seen"])
        buffer = bytearray(4)
        assert reader.read_into(0, buffer) == 4
        assert buffer == b"seen"
        writer.close()
        reader.close()

    def test_an_open_file_outlives_its_name(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.write(0, [b"kept"])
        directory.remove("log")
        buffer = bytearray(4)
        assert file.read_into(0, buffer) == 4
        assert buffer == b"kept"
        file.close()

    def test_direct_writes_of_aligned_buffers_read_back(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True, preallocate_bytes=8 * ALIGNMENT, direct=True)
        file.write(ALIGNMENT, [aligned(b"a"), aligned(b"b", 2)])
        file.synchronize()
        buffer = aligned(b".", 4)
        assert file.read_into(0, buffer) == 4 * ALIGNMENT
        assert bytes(buffer) == bytes(ALIGNMENT) + b"a" * ALIGNMENT + b"b" * 2 * ALIGNMENT
        file.close()

    def test_a_direct_read_stops_at_an_unaligned_end(self, directory: DurableDirectory) -> None:
        directory.replace("log", b"x" * (ALIGNMENT + 10))
        file = directory.open("log", direct=True)
        buffer = aligned(b".", 4)
        assert file.read_into(0, buffer) == ALIGNMENT + 10
        assert bytes(buffer[: ALIGNMENT + 10]) == b"x" * (ALIGNMENT + 10)
        file.close()

    def test_closing_twice_is_no_error(self, directory: DurableDirectory) -> None:
        file = directory.open("log", create=True)
        file.close()
        file.close()

    def test_free_space_is_told(self, directory: DurableDirectory) -> None:
        assert directory.free_bytes() > 0
