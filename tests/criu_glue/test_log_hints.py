"""CRIU's logs: the line that matters and the remedy, from lines that CRIU writes."""

from __future__ import annotations

import pytest

from criu_glue.core.log_hints import LINE_CHARACTERS_MAX, explain

NOISE = """\
(00.0007) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE: Operation not permitted
(00.001000) Warn  (criu/kerndat.c:1): can't lookup mount here, cgroup, io_uring
(00.010000) 	type TCP
"""
END = """\
(00.140207) Error (criu/cr-dump.c:2133): Dumping FAILED.
"""

LINES = [
    ("Error (criu/vdso.c:401): Unexpected rt vDSO area bounds", "4.1"),
    (
        "Error (x.c:97): Can't dump file 5 of that type [600] (anon anon_inode:[io_uring])",
        "io_uring",
    ),
    ("Error (x.c:97): Can't dump file 7 of that type [20666] (chr 195:255)", "GPU"),
    (
        "Error (x.c:97): Can't dump file 7 of that type [0] (anon anon_inode:[x])",
        "kind",
    ),
    ("Error (x.c:1807): Can't lookup mount=28 for fd=1 path=/out", "outside"),
    ("Error (criu/sk-unix.c:1): External socket is used. Consider using --ext-unix-sk", "unix"),
    (
        "Error (x.c:1122): Can't create link remap for /a. Use link-remap option.",
        "link",
    ),
    (
        "Error (x.c:1031): Can't dump ghost file /a of 2097152 size, increase limit",
        "1 MiB",
    ),
    ("Error (x.c:2001): File var/log/x has bad size 12 (expect 10)", "changed"),
    ("Error (x.c:1999): File usr/bin/x has bad build-ID", "build"),
    ("Error (criu/sockets.c:9): Can't get 1:16 opt: Operation not supported", "4.2.1"),
    ("Error (criu/cr-restore.c:1230): Can't fork for 41: File exists", "pid"),
    ("Error (criu/cpu.c:1): CPU capabilities do not match run time", "processor"),
    ("Error (criu/cr-restore.c:1262): 41 killed by signal 4: Illegal instruction", "processor"),
    (
        "Error (x.c:635): Unable to freeze cgroup /x (100 x 100ms attempts, timeout: 10s)",
        "stop in time",
    ),
    ("Error (criu/tty.c:1): Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0.", "terminal"),
    (
        "Error (x.c:1): Locking network failed: iptables-restore returned -1.",
        "network-lock",
    ),
    (
        "Error (x.c:1): Connected TCP socket, consider using --tcp-established option.",
        "tcp-established",
    ),
    ("Error (criu/pagemap.c:1): No parent for snapshot pagemap", "page store"),
    ("Error (criu/pagemap.c:1): Missing 7f0011 in parent pagemap", "page store"),
    ("BUG at criu/mem.c:45", "soft-dirty"),
    (
        "Error (x.c:300): connect to lazy-pages.socket failed: No such file or directory",
        "pager",
    ),
    ("Error (criu/cgroup.c:1): Cgroup dir /x doesn't exist", "manage-cgroups"),
    ("Error (criu/image.c:1): Unable to open /x: Permission denied", "right"),
    ("Error (criu/image.c:1): Can't write: No space left on device", "memory"),
]


@pytest.mark.parametrize(("line", "word"), LINES)
def test_a_known_cause_has_a_remedy(line: str, word: str) -> None:
    hint = explain(f"{NOISE}(00.100000)     41: {line}\n{END}")
    assert line.endswith(hint.line)
    assert word in hint.remedy


def test_the_first_error_is_shown_when_nobody_knows_it() -> None:
    log = NOISE + "(00.1) Error (criu/x.c:1): first\n(00.2) Error (criu/x.c:2): second\n" + END
    hint = explain(log)
    assert (hint.line, hint.remedy) == ("first", "")


def test_the_first_known_error_wins_over_later_ones() -> None:
    log = "Error (a.c:1): odd\nError (a.c:2): File /x has bad size 12 (expect 10)\n"
    log += "Error (a.c:3): In-flight connection (l) for 5\n"
    assert "changed" in explain(log).remedy


def test_special_errors_win_over_general_ones() -> None:
    log = "Error (a.c:1): open: Permission denied\nError (a.c:2): File x has bad build-ID\n"
    assert "build" in explain(log).remedy


def test_consequences_are_shown_only_alone() -> None:
    assert explain(NOISE + END).line == "Dumping FAILED."
    assert explain(NOISE) == explain("")
    assert explain("").line == ""


def test_a_line_without_end_is_cut() -> None:
    assert len(explain("Error (a.c:1): " + "x" * 10_000).line) == LINE_CHARACTERS_MAX
