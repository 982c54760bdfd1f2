from __future__ import annotations

from bench.vm import console


def test_a_kernel_that_fails_is_quoted_from_there_on() -> None:
    fine = "[    0.1] Linux version 6.12\n[    5.0] audit: nothing BUGgy\nMACHINE UP\n"
    assert console.faults(fine) == ""
    oops = "[    9.0] Oops: general protection fault\n[    9.1] RIP: 0010:x\n"
    assert console.faults(fine + oops) == oops.strip()
    for line in ("BUG: Bad page state", "Kernel panic - not syncing", "kernel BUG at mm/slub.c:1!"):
        assert console.faults(fine + line) == line
    assert len(console.faults(oops + "more\n" * 1000).splitlines()) == console.LINES_AFTER
