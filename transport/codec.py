"""Compressing the bodies of frames, as hard as the link deserves, and decompressing them safely.

`Encoder` and `Decoder` belong to one thread each. Neither knows frames' headers or sockets; the
encoder is told how long the link took for its bytes.

How the level is chosen: the thread that compresses also sends, so that a raw byte costs it ::

    seconds(level) = seconds to compress a raw byte + ratio * seconds the link takes for a byte
    seconds(raw)   =                                          seconds the link takes for a byte

and the smallest wins. All of these are moving averages of this stream's own measurements, which
therefore include that streams share cores and link. A fast link makes `raw` win; a slow one the
level with the best ratio. Every `EXPLORE_FRAMES` frames the neighbouring level is tried once, since
data and link change; less often where the last try was much worse, as compression is on a link that
outruns it.

Before all that, a sample of the body is compressed: data that does not shrink is sent raw for that
cost only, and when it did not shrink several times, the next frames are not even sampled.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import zstandard

from transport.core.frames import Codec
from transport.errors import FrameUndecodableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transport.core.frames import Data

LEVELS = (1, 2, 3)
"""Above 3 zstd gets slower than any link that is worth migrating over."""
SAMPLE_BYTES = 16 << 10
SAMPLE_PIECES = 4
"""The sample is taken from four places of a frame: a page may be unlike its neighbours."""
WORTHWHILE_RATIO = 0.9
"""Compressing to more than this saves less than it costs on both sides."""
EXPLORE_FRAMES = 32
"""A try every 32 frames costs 3 % if it took twice as long as what was best."""
UNEXPLORED_FRAMES_MAX = 512
"""If it took n times as long, the next one comes after n times as many frames, up to these. A link
that gets slower meanwhile needs no try: what is known of the levels is weighed anew each time."""
SAMPLES_SKIPPED_MAX = 15
"""Frames sent without a sample in a row, in data that does not compress."""
WINDOW_LOG_MAX = 21
"""Largest window that a peer may ask for, 2 MiB; what levels 1 to 3 make of 1 MiB needs less."""

_WEIGHT = 0.25
"""Of the newest measurement in the moving averages: most of the change is in after eight frames."""


class LevelPolicy:
    """Which level pays, from what was measured. Level 0 means raw. Pure."""

    def __init__(self) -> None:
        self._link_s = 0.0  # for a byte on the wire
        self._compress_s: dict[int, float] = {}  # for a raw byte
        self._ratio: dict[int, float] = {}
        self._tries = 0
        self._frames_to_try = EXPLORE_FRAMES

    def choose(self) -> int:
        """The level for the next frame."""
        self._frames_to_try -= 1
        if self._ratio and self._frames_to_try > 0:
            return self._best()
        self._tries += 1
        self._frames_to_try = EXPLORE_FRAMES
        return self._neighbour(self._best())

    def cost_s(self, level: int) -> float:
        """Predicted seconds for a raw byte; only for levels that were tried."""
        if level == 0:
            return self._link_s
        return self._compress_s[level] + self._ratio[level] * self._link_s

    def compressed(self, level: int, raw_bytes: int, encoded_bytes: int, elapsed_s: float) -> None:
        self._compress_s[level] = _moved(self._compress_s.get(level), elapsed_s / raw_bytes)
        self._ratio[level] = _moved(self._ratio.get(level), encoded_bytes / raw_bytes)
        best_s = self.cost_s(self._best())
        if best_s > 0:
            worse = self.cost_s(level) / best_s - 1
            frames = min(round(EXPLORE_FRAMES * worse), UNEXPLORED_FRAMES_MAX)
            self._frames_to_try = max(self._frames_to_try, frames)

    def sent(self, wire_bytes: int, elapsed_s: float) -> None:
        self._link_s = _moved(self._link_s or None, elapsed_s / wire_bytes)

    def _best(self) -> int:
        return min((0, *self._ratio), key=self.cost_s)

    def _neighbour(self, level: int) -> int:
        """The level to try: the next one up and the next one down in turns."""
        upwards = self._tries % 2 == 1
        return min(max(level + (1 if upwards else -1), LEVELS[0]), LEVELS[-1])


class Encoder:
    """Compresses the bodies of one stream. Not thread-safe. `clock`: monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._compressors = {level: zstandard.ZstdCompressor(level=level) for level in LEVELS}
        self._policy = LevelPolicy()
        self._clock = clock
        self._incompressible = 0
        self._skip = 0

    def encode(self, body: memoryview) -> tuple[Codec, Data]:
        """`body` compressed, or itself if that is better. Takes 10 µs to 3 ms for 1 MiB."""
        level = self._policy.choose()
        if level == 0 or not self._compressible(body):
            return Codec.RAW, body
        before_s = self._clock()
        encoded = self._compressors[level].compress(body)
        self._policy.compressed(level, len(body), len(encoded), self._clock() - before_s)
        if len(encoded) > len(body) * WORTHWHILE_RATIO:
            return Codec.RAW, body
        return Codec.ZSTD, encoded

    def sent(self, wire_bytes: int, elapsed_s: float) -> None:
        """The link took `elapsed_s` for `wire_bytes`, waiting for room in the window included."""
        self._policy.sent(wire_bytes, elapsed_s)

    def _compressible(self, body: memoryview) -> bool:
        if self._skip > 0:
            self._skip -= 1
            return False
        sample = _sample(body)
        if len(self._compressors[LEVELS[0]].compress(sample)) <= len(sample) * WORTHWHILE_RATIO:
            self._incompressible = 0
            return True
        self._incompressible += 1
        self._skip = min(self._incompressible - 1, SAMPLES_SKIPPED_MAX)
        return False


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


def _moved(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT * (newest - average)


def _sample(body: memoryview) -> Data:
    if len(body) <= SAMPLE_BYTES:
        return body
    piece = SAMPLE_BYTES // SAMPLE_PIECES
    step = (len(body) - piece) // (SAMPLE_PIECES - 1)
    return b"".join(body[at * step : at * step + piece] for at in range(SAMPLE_PIECES))
