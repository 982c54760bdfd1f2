"""Compressing the bodies of frames, as hard as the link deserves, and decompressing them safely.

`Encoder` and `Decoder` belong to one thread each. Neither knows frames' headers or sockets; the
encoder is told how long the link took for its bytes.

How the level is chosen: the thread that compresses also sends, so that a raw byte costs it ::

    seconds(level) = seconds to compress a raw byte + ratio * seconds the link takes for a byte
    seconds(raw)   =                                          seconds the link takes for a byte

and the smallest wins. A fast link makes `raw` win; a slow one the level with the best ratio. What
the link takes is a moving average of what this stream has sent, which therefore includes that
streams share the link. What the levels take is found out by probes: each of them compresses the
same data, a frame where compressing pays, else pieces of one, so that a link that outruns them all
does not wait. A probe comes again when it has cost PROBE_SHARE of what was sent since.

Pages differ: where compressing pays, a sample of each body is compressed first, and a body that
does not shrink is sent raw for that cost only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import zstandard

from transport.core.frames import Codec
from transport.errors import FrameUndecodableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transport.core.frames import Data

LEVELS = (1, 2, 3)
"""Above 3 zstd gets slower than any link that is worth migrating over."""
SAMPLE_BYTES = 16 << 10
PIECES = 4
"""A sample is taken from four places of a frame: a page may be unlike its neighbours."""
WORTHWHILE_RATIO = 0.9
"""Compressing to more than this saves less than it costs on both sides."""
LINK_S = 8e-9
"""For a byte, until something was sent: a gigabit link."""
PROBE_BYTES = 128 << 10
"""In less of a frame the levels find less than in all of it."""
PROBE_SHARE = 0.005
"""Of the time that the link took."""
PROBE_FRAMES_MIN = 8
"""Often enough to find data that compresses behind some that does not,"""
PROBE_FRAMES_MAX = 512
"""and that a link has become slow, or free."""
WINDOW_LOG_MAX = 21
"""Largest window that a peer may ask for, 2 MiB; what levels 1 to 3 make of 1 MiB needs less."""

_WEIGHT = 0.25
"""Of the newest frame's time on the link in the moving average: a change is in after eight."""
_PROBE_WEIGHT = 0.5
"""Of the newest probe: after three."""


class LevelPolicy:
    """Which level pays, from what was measured. Level 0 means raw. Pure."""

    def __init__(self) -> None:
        self._link_s: float | None = None  # for a byte on the wire
        self._compress_s: dict[int, float] = {}  # for a raw byte
        self._ratio: dict[int, float] = {}
        self._probe_s = 0.0
        # Since the last probe.
        self._sent_s = 0.0
        self._frames = 0

    def wants_probe(self, raw_bytes: int) -> bool:
        """Asked once for each frame, whose body has so many bytes."""
        self._frames += 1
        if not self._ratio:
            return True
        is_paid = self._probe_s <= self._sent_s * PROBE_SHARE and self._frames > PROBE_FRAMES_MIN
        return raw_bytes >= PROBE_BYTES and (is_paid or self._frames > PROBE_FRAMES_MAX)

    def probed(self, raw_bytes: int, found: Mapping[int, tuple[int, float]]) -> None:
        """So many bytes became these of each level, in so many seconds."""
        for level, (encoded_bytes, elapsed_s) in found.items():
            spent_s, ratio = elapsed_s / raw_bytes, encoded_bytes / raw_bytes
            self._compress_s[level] = _moved(self._compress_s.get(level), spent_s, _PROBE_WEIGHT)
            self._ratio[level] = _moved(self._ratio.get(level), ratio, _PROBE_WEIGHT)
        self._probe_s = sum(elapsed_s for _, elapsed_s in found.values())
        self._sent_s, self._frames = 0.0, 0

    def sent(self, wire_bytes: int, elapsed_s: float) -> None:
        """The link took `elapsed_s` for `wire_bytes`."""
        self._link_s = _moved(self._link_s, elapsed_s / wire_bytes, _WEIGHT)
        self._sent_s += elapsed_s

    def best(self) -> int:
        """The level that pays most."""
        return min((0, *self._ratio), key=self.cost_s)

    def cost_s(self, level: int) -> float:
        """Predicted seconds for a raw byte; only for levels that were probed."""
        link_s = LINK_S if self._link_s is None else self._link_s
        if level == 0:
            return link_s
        return self._compress_s[level] + self._ratio[level] * link_s


class Encoder:
    """Compresses the bodies of one stream. Not thread-safe. `clock`: monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._compressors = {level: zstandard.ZstdCompressor(level=level) for level in LEVELS}
        self._policy = LevelPolicy()
        self._clock = clock

    def encode(self, body: memoryview) -> tuple[Codec, Data]:
        """`body` compressed, or itself if that is better. For 1 MiB it takes 1 µs to 5 ms, and a
        probe up to 15."""
        if self._policy.wants_probe(len(body)):
            self._probe(body)
        level = self._policy.best()
        if level == 0 or not self._shrinks(_pieces(body, SAMPLE_BYTES)):
            return Codec.RAW, body
        encoded = self._compressors[level].compress(body)
        if len(encoded) > len(body) * WORTHWHILE_RATIO:
            return Codec.RAW, body
        return Codec.ZSTD, encoded

    def sent(self, wire_bytes: int, elapsed_s: float) -> None:
        """The link, or a bandwidth that is kept to, took `elapsed_s` for `wire_bytes`."""
        self._policy.sent(wire_bytes, elapsed_s)

    def _probe(self, body: memoryview) -> None:
        # All of a body says more, and where compressing pays its time is there.
        data, found = body if self._policy.best() else _pieces(body, PROBE_BYTES), {}
        for level, compressor in self._compressors.items():
            before_s = self._clock()
            encoded_bytes = len(compressor.compress(data))
            found[level] = (encoded_bytes, self._clock() - before_s)
        self._policy.probed(len(data), found)

    def _shrinks(self, sample: Data) -> bool:
        encoded_bytes = len(self._compressors[LEVELS[0]].compress(sample))
        return encoded_bytes <= len(sample) * WORTHWHILE_RATIO


class Decoder:
    """Decompresses the bodies of one stream, never to more than was declared. Not thread-safe."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_LOG_MAX)

    def decode(self, codec: Codec, body: memoryview, raw_bytes: int) -> memoryview:
        """The `raw_bytes` that `body` encodes (itself if raw). Raises FrameUndecodableError.

        Allocates `raw_bytes`, which the caller has held against its limit.
        """
        if codec == Codec.RAW:
            return body
        try:
            # The library allocates what the compressed data claims: that must be what the frame
            # claims.
            claimed = zstandard.frame_content_size(body)
            if claimed != raw_bytes:
                raise FrameUndecodableError(f"a body claims {claimed} bytes instead of {raw_bytes}")
            raw = self._decompressor.decompress(body, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FrameUndecodableError(f"a body does not decompress: {error}") from error
        if len(raw) != raw_bytes:
            raise FrameUndecodableError(f"a body has {len(raw)} bytes instead of {raw_bytes}")
        return memoryview(raw)


def _moved(average: float | None, newest: float, weight: float) -> float:
    return newest if average is None else average + weight * (newest - average)


def _pieces(body: memoryview, total_bytes: int) -> Data:
    if len(body) <= total_bytes:
        return body
    piece = total_bytes // PIECES
    step = (len(body) - piece) // (PIECES - 1)
    return b"".join(body[at * step : at * step + piece] for at in range(PIECES))
