"""Compression: what pays is chosen, and what a peer sends is never believed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from transport.codec import (
    EXPLORE_FRAMES,
    LEVELS,
    SAMPLES_SKIPPED_MAX,
    UNEXPLORED_FRAMES_MAX,
    Decoder,
    Encoder,
    LevelPolicy,
)
from transport.core.frames import FRAME_RAW_BYTES_MAX, Codec
from transport.errors import FrameError, FrameUndecodableError

RANDOM = random.Random(1).randbytes(FRAME_RAW_BYTES_MAX)
TEXT = b"".join(b"%d: %x\n" % (n, n * n) for n in range(100_000))[:FRAME_RAW_BYTES_MAX]
SLOW_LINK_S = 1e-6  # for a byte: 1 MB/s
FAST_LINK_S = 1e-12


COMPRESSING_S = 0.001
"""What compressing anything takes by the tests' clock."""


def ticking() -> Callable[[], float]:
    """A clock that goes on by COMPRESSING_S each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * COMPRESSING_S


def encoded_on(link_s: float, body: bytes, frames: int) -> list[tuple[Codec, int]]:
    """What an encoder makes of `frames` equal frames on a link of `link_s` for a byte."""
    encoder = Encoder(clock=ticking())
    made = []
    for _ in range(frames):
        codec, data = encoder.encode(memoryview(body))
        encoder.sent(len(data), len(data) * link_s)
        made.append((codec, len(data)))
    return made


def test_on_a_slow_link_the_smallest_output_wins() -> None:
    sizes = [len(zstandard.ZstdCompressor(level=level).compress(TEXT)) for level in LEVELS]
    assert sizes.index(min(sizes)) != 0, "nothing to find beyond the first level"
    made = encoded_on(SLOW_LINK_S, TEXT, 4 * EXPLORE_FRAMES - 1)
    assert all(codec == Codec.ZSTD for codec, _ in made)
    assert made[-1][1] == min(sizes)


def test_a_link_that_outruns_the_compressor_switches_it_off() -> None:
    made = encoded_on(FAST_LINK_S, TEXT, EXPLORE_FRAMES - 1)
    assert [codec for codec, _ in made].count(Codec.ZSTD) == 1  # the first, to measure it


def test_compression_comes_back_when_the_link_gets_slow() -> None:
    encoder = Encoder(clock=ticking())
    for _ in range(10):
        _, data = encoder.encode(memoryview(TEXT))
        encoder.sent(len(data), len(data) * FAST_LINK_S)
    assert encoder.encode(memoryview(TEXT))[0] == Codec.RAW
    for _ in range(30):
        encoder.sent(1 << 20, SLOW_LINK_S * (1 << 20))
    assert encoder.encode(memoryview(TEXT))[0] == Codec.ZSTD


def test_data_that_does_not_compress_is_sent_as_it_is() -> None:
    assert all(codec == Codec.RAW for codec, _ in encoded_on(SLOW_LINK_S, RANDOM, 50))


def test_compressible_data_is_found_again_soon_after_random() -> None:
    encoder = Encoder(clock=ticking())
    for _ in range(200):
        encoder.encode(memoryview(RANDOM))
    encoder.sent(1 << 20, SLOW_LINK_S * (1 << 20))
    codecs = [encoder.encode(memoryview(TEXT))[0] for _ in range(SAMPLES_SKIPPED_MAX + 1)]
    assert codecs[-1] == Codec.ZSTD


def test_a_raw_body_is_not_copied() -> None:
    body = memoryview(RANDOM)
    assert Encoder().encode(body)[1] is body
    assert Decoder().decode(Codec.RAW, body, len(body)) is body


def test_the_policy_weighs_time_against_bytes() -> None:
    policy = LevelPolicy()
    policy.sent(100, 100.0)  # 1 s for a byte
    policy.compressed(1, 100, 50, 40.0)  # 0.4 + 0.5 s
    assert policy.cost_s(0) == pytest.approx(1.0)
    assert policy.cost_s(1) == pytest.approx(0.9)
    assert policy.choose() == 1
    policy.compressed(2, 100, 40, 70.0)  # 0.7 + 0.4 s
    assert policy.choose() == 1


def test_the_policy_tries_its_neighbours_now_and_then() -> None:
    policy = LevelPolicy()
    policy.sent(100, 100.0)
    policy.compressed(1, 100, 50, 0.1)
    chosen = [policy.choose() for _ in range(2 * EXPLORE_FRAMES)]
    assert set(chosen) == {1, 2}
    assert chosen.count(2) == 1


def test_a_try_that_was_much_worse_is_not_soon_made_again() -> None:
    policy = LevelPolicy()
    policy.sent(100, 1.0)  # 0.01 s for a byte
    tries, since = [], 0
    for _ in range(UNEXPLORED_FRAMES_MAX * 3):
        since += 1
        if level := policy.choose():
            policy.compressed(level, 100, 50, 4.5)  # 0.045 + 0.005 s: five times as long
            tries.append(since)
            since = 0
    assert set(tries[1:]) == {4 * EXPLORE_FRAMES}
    policy.compressed(1, 100, 50, 1e9)
    assert [policy.choose() for _ in range(UNEXPLORED_FRAMES_MAX)].index(1) == (
        UNEXPLORED_FRAMES_MAX - 1
    )


@given(st.one_of(st.binary(min_size=1, max_size=5000), st.just(TEXT), st.just(RANDOM[:9000])))
def test_bodies_round_trip(body: bytes) -> None:
    codec, data = Encoder().encode(memoryview(body))
    assert bytes(Decoder().decode(codec, memoryview(data), len(body))) == body


def bombs() -> Iterator[object]:
    honest = zstandard.ZstdCompressor().compress(bytes(4096))
    yield pytest.param(zstandard.ZstdCompressor().compress(bytes(1 << 26)), id="claims-more")
    yield pytest.param(zstandard.ZstdCompressor().compress(bytes(4095)), id="claims-less")
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    yield pytest.param(unsized.compress(bytes(4096)), id="claims-nothing")
    yield pytest.param(unsized.compress(bytes(1 << 26)), id="claims-nothing-is-large")
    # 1 TiB in a header of 14 bytes (RFC 8878, 3.1.1.1): may not even be allocated.
    huge = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\0\0"
    yield pytest.param(huge, id="claims-far-more")
    yield pytest.param(honest + b"\0", id="trailing-byte")
    yield pytest.param(honest + honest, id="two-frames")
    yield pytest.param(honest[:-1], id="cut")
    yield pytest.param(b"", id="empty")
    yield pytest.param(b"\x28\xb5\x2f\xfd", id="magic-only")
    yield pytest.param(b"\x50\x2a\x4d\x18" + bytes(4) + honest, id="skippable-frame")
    far = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=far).compressobj(size=4096)
    yield pytest.param(stream.compress(bytes(4096)) + stream.flush(), id="same-size-far-window")


@pytest.mark.parametrize("body", list(bombs()))
def test_compressed_bodies_that_lie(body: bytes) -> None:
    try:
        data = Decoder().decode(Codec.ZSTD, memoryview(body), 4096)
    except FrameUndecodableError:
        return
    # The one that may pass says 4096 bytes and has them: zstd narrows a window to the content.
    assert bytes(data) == bytes(4096)
    assert zstandard.get_frame_parameters(body).window_size <= 4096


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_of_a_compressed_body_gives_a_frame_error_or_the_declared_size(
    place: int, flip: int
) -> None:
    body = bytearray(zstandard.ZstdCompressor().compress(TEXT[:50_000]))
    body[place % len(body)] ^= flip
    try:
        data = Decoder().decode(Codec.ZSTD, memoryview(body), 50_000)
    except FrameError:
        return
    assert len(data) == 50_000
