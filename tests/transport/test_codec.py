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
    LEVELS,
    PROBE_BYTES,
    PROBE_FRAMES_MAX,
    PROBE_FRAMES_MIN,
    PROBE_SHARE,
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
    made = encoded_on(SLOW_LINK_S, TEXT, 5 * PROBE_FRAMES_MIN)
    # Of the first it does not know the link.
    assert all(codec == Codec.ZSTD for codec, _ in made[1:])
    assert made[-1][1] == min(sizes)


def test_a_link_that_outruns_the_compressor_waits_for_no_frame() -> None:
    encoder = Encoder(clock=ticking())
    encoder.sent(1 << 20, FAST_LINK_S * (1 << 20))
    codecs = [encoder.encode(memoryview(TEXT))[0] for _ in range(2 * PROBE_FRAMES_MAX)]
    assert set(codecs) == {Codec.RAW}


def test_compression_comes_back_when_the_link_gets_slow() -> None:
    encoder = Encoder(clock=ticking())
    for _ in range(20):
        encoder.sent(1 << 20, FAST_LINK_S * (1 << 20))
    assert encoder.encode(memoryview(TEXT))[0] == Codec.RAW
    for _ in range(30):
        encoder.sent(1 << 20, SLOW_LINK_S * (1 << 20))
    assert encoder.encode(memoryview(TEXT))[0] == Codec.ZSTD


def test_data_that_does_not_compress_is_sent_as_it_is() -> None:
    assert all(codec == Codec.RAW for codec, _ in encoded_on(SLOW_LINK_S, RANDOM, 50))


def test_a_body_among_others_that_does_not_compress_is_sent_as_it_is() -> None:
    encoder = Encoder(clock=ticking())
    encoder.sent(1 << 20, SLOW_LINK_S * (1 << 20))
    bodies = [TEXT, RANDOM] * PROBE_FRAMES_MIN
    codecs = [encoder.encode(memoryview(body))[0] for body in bodies]
    assert codecs == [Codec.ZSTD, Codec.RAW] * PROBE_FRAMES_MIN


def test_compressible_data_is_found_again_soon_after_random() -> None:
    encoder = Encoder(clock=ticking())
    for _ in range(200):
        encoder.encode(memoryview(RANDOM))
        encoder.sent(1 << 20, SLOW_LINK_S * (1 << 20))
    codecs = [encoder.encode(memoryview(TEXT))[0] for _ in range(PROBE_FRAMES_MIN + 1)]
    assert codecs[-1] == Codec.ZSTD


def test_a_raw_body_is_not_copied() -> None:
    body = memoryview(RANDOM)
    assert Encoder().encode(body)[1] is body
    assert Decoder().decode(Codec.RAW, body, len(body)) is body


def test_the_policy_weighs_time_against_bytes() -> None:
    policy = LevelPolicy()
    policy.sent(100, 100.0)  # 1 s for a byte
    policy.probed(100, {1: (50, 40.0), 2: (40, 70.0)})  # 0.4 + 0.5 s, 0.7 + 0.4 s
    assert [policy.cost_s(level) for level in range(3)] == pytest.approx([1.0, 0.9, 1.1])
    assert policy.best() == 1


def test_levels_are_compared_by_the_same_data() -> None:
    """Whatever that is: the one that makes less of each probe wins on a slow link."""
    policy = LevelPolicy()
    policy.sent(100, 1.0)
    for share in (0.2, 0.9, 0.5, 0.8, 0.1):
        policy.probed(100, {1: (int(100 * share), 1e-6), 3: (int(100 * share) - 5, 2e-6)})
        assert policy.best() == 3


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_probes_take_a_small_share_of_the_time(frame_s: float, probe_s: float) -> None:
    policy = LevelPolicy()
    assert policy.wants_probe(PROBE_BYTES)
    policy.probed(PROBE_BYTES, {1: (PROBE_BYTES // 2, probe_s)})
    frames = 0
    while not policy.wants_probe(PROBE_BYTES):
        policy.sent(1000, frame_s)
        frames += 1
    assert PROBE_FRAMES_MIN <= frames <= PROBE_FRAMES_MAX
    is_rare = probe_s <= PROBE_SHARE * frames * frame_s
    assert is_rare or frames == PROBE_FRAMES_MAX
    # And no rarer than that.
    assert frames == PROBE_FRAMES_MIN or probe_s > PROBE_SHARE * (frames - 1.01) * frame_s


def test_small_bodies_are_no_probe_once_there_was_one() -> None:
    policy = LevelPolicy()
    assert policy.wants_probe(10)
    policy.probed(10, {1: (5, 1.0)})
    assert not any(policy.wants_probe(PROBE_BYTES - 1) for _ in range(2 * PROBE_FRAMES_MAX))
    assert policy.wants_probe(PROBE_BYTES)


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
