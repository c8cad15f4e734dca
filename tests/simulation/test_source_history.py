"""The oracle dates every image of the source exactly."""

import random

from tests.simulation.source_history import ORACLE_BLOCK_BYTES, SourceHistory


def test_every_image_that_the_source_ever_showed_is_dated_and_no_other_one():
    draw = random.Random(1)
    size = 16 * ORACLE_BLOCK_BYTES
    history = SourceHistory(draw.randbytes(size), 100)
    images = [bytes(history.image)]
    for version in range(1, 60):
        length = draw.randrange(1, 3 * ORACLE_BLOCK_BYTES)
        history.write(draw.randrange(size - length), draw.randbytes(length), 100 + version * 10)
        images.append(bytes(history.image))
    for version, image in enumerate(images):
        assert history.versions_of(image) == [version]
    mixed = images[10][: size // 2] + images[50][size // 2 :]
    assert history.versions_of(mixed) == []
    assert history.versions_of(images[3][:-1]) == []


def test_an_image_that_came_back_has_every_version_at_which_it_was_there():
    history = SourceHistory(bytes(ORACLE_BLOCK_BYTES), 0)
    history.write(0, b"x", 1)
    history.write(0, b"\0", 2)
    history.write(100, b"\0", 3)
    assert history.versions_of(bytes(ORACLE_BLOCK_BYTES)) == [0, 2, 3]


def test_the_version_at_an_instant_includes_the_writes_of_that_instant():
    history = SourceHistory(bytes(ORACLE_BLOCK_BYTES), 10)
    history.write(0, b"x", 20)
    assert [history.version_at(instant) for instant in (9, 10, 19, 20, 21)] == [-1, 0, 0, 1, 1]
    assert history.instant_ns_of(1) == 20
