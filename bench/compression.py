"""What adaptive compression costs and saves, beside none and beside level 3 always.

The product's encoder compresses real frames of 1 MiB; the link is a sum, so long for so many bytes.
A stream's thread does one after the other, so its time is both together. What counts is processor
time, so that it does not matter what else runs on the machine, but for its caches.

    text      words, as logs and documents have them
    program   machine code and tables: the interpreter itself
    mixed     pages of text and of random bytes in turn
    random    what does not compress

Usage: python -m bench.compression [--frames 256]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import zstandard

from transport.codec import Encoder
from transport.core.frames import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB: Final = 1 << 20
LEVEL: Final = 3
FRAMES_MAX: Final = 10_000
LINKS_BITS: Final = {"10 Gbit/s": 1e10, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8, "20 Mbit/s": 2e7}
SYLLABLES: Final = b"la mi no re ta si ko du an er is on ut el ar im".split()


class Sender:
    """One stream: what it has sent over its link, and what time that took. `compress`: a frame's
    body for the wire; `sent` hears of each (bytes, seconds)."""

    def __init__(
        self,
        compress: Callable[[memoryview], int],
        bits_per_s: float,
        sent: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        self._compress = compress
        self._bytes_per_s = bits_per_s / 8
        self._sent = sent
        self.wire_bytes = 0
        self.took_s = 0.0

    def send(self, frame: memoryview) -> None:
        before_s = time.thread_time()
        wire_bytes = self._compress(frame)
        compressing_s = time.thread_time() - before_s
        link_s = wire_bytes / self._bytes_per_s
        self._sent(wire_bytes, link_s)
        self.wire_bytes += wire_bytes
        self.took_s += compressing_s + link_s


def senders(bits_per_s: float) -> dict[str, Sender]:
    """The three that are compared."""
    encoder = Encoder(clock=time.thread_time)
    always = zstandard.ZstdCompressor(level=LEVEL)
    return {
        "none": Sender(len, bits_per_s),
        "level 3": Sender(lambda frame: len(always.compress(frame)), bits_per_s),
        "adaptive": Sender(lambda frame: len(encoder.encode(frame)[1]), bits_per_s, encoder.sent),
    }


def text(chance: random.Random) -> bytes:
    """A frame of words."""
    words: list[bytes] = []
    while len(words) < MIB // 4:
        words += [b"".join(chance.choices(SYLLABLES, k=chance.randrange(1, 5))), b" "]
    return b"".join(words)[:MIB]


def mixed(chance: random.Random) -> bytes:
    """Every other page is random."""
    words = memoryview(text(chance))
    return b"".join(
        chance.randbytes(PAGE_BYTES) if at % (2 * PAGE_BYTES) else words[at : at + PAGE_BYTES]
        for at in range(0, MIB, PAGE_BYTES)
    )


def frames(kind: str, count: int) -> Iterator[memoryview]:
    """So many; a few different ones in turn."""
    chance = random.Random(1)  # noqa: S311  the same data in every run
    program = Path(sys.executable).resolve().read_bytes()
    makers: dict[str, Callable[[int], bytes]] = {
        "text": lambda _: text(chance),
        "program": lambda at: program[at * MIB :][:MIB],
        "mixed": lambda _: mixed(chance),
        "random": lambda _: chance.randbytes(MIB),
    }
    different = [memoryview(makers[kind](at)) for at in range(min(len(program) // MIB, 4))]
    for at in range(count):
        yield different[at % len(different)]


@dataclass(frozen=True, slots=True)
class Row:
    """Of one kind of data and one link. times: of each way, by that without compression; sizes: by
    that of level 3."""

    data: str
    link: str
    times: dict[str, float]
    sizes: dict[str, float]


def measure(count: int) -> Iterator[Row]:
    """Each kind of data over each link."""
    for kind in ("text", "program", "mixed", "random"):
        for link, bits_per_s in LINKS_BITS.items():
            ways = senders(bits_per_s)
            for frame in frames(kind, count):
                for way in ways.values():
                    way.send(frame)
            none_s, always_bytes = ways["none"].took_s, ways["level 3"].wire_bytes
            times = {name: round(way.took_s / none_s, 3) for name, way in ways.items()}
            sizes = {name: round(way.wire_bytes / always_bytes, 3) for name, way in ways.items()}
            yield Row(kind, link, times, sizes)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.compression", description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=256, help="of 1 MiB, of each kind and link")
    options = parser.parse_args()
    if not 1 <= options.frames <= FRAMES_MAX:
        parser.error(f"--frames: 1 to {FRAMES_MAX}")
    print(f"{options.frames} frames of 1 MiB; time of none = 1, bytes of level 3 = 1")
    print(
        f"{'data':9}{'link':12}{'time: level 3':>14}{'adaptive':>10}"
        f"{'bytes: none':>14}{'adaptive':>10}"
    )
    for row in measure(options.frames):
        times, sizes = row.times, row.sizes
        print(
            f"{row.data:9}{row.link:12}{times['level 3']:14.2f}{times['adaptive']:10.2f}"
            f"{sizes['none']:14.2f}{sizes['adaptive']:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
