"""What a Postgres workload holds: the tables of pgbench, whose sums prove each other.

Every transaction of pgbench adds one amount to an account, a teller and a branch, and writes it
into a history. So the four sums are the same whenever they are looked at. Both programs run in the
client's host, which has them in labs of comparisons only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bench.lab.host import Host

USER: Final = "postgres"
SCALE_MIB: Final = 16
"""A branch with its accounts, on disk and in the server's buffers."""
_SUMS: Final = """
SELECT count(DISTINCT total), count(*) FROM (
    SELECT sum(abalance) AS total FROM pgbench_accounts
    UNION ALL SELECT sum(bbalance) FROM pgbench_branches
    UNION ALL SELECT sum(tbalance) FROM pgbench_tellers
    UNION ALL SELECT coalesce(sum(delta), 0) FROM pgbench_history
) AS totals
"""


def fill(client: Host, address: str, mib: int) -> None:
    """Make the tables. Raises LabError."""
    scale = max(1, mib // SCALE_MIB)
    client.run(["pgbench", "-i", "-q", "-s", str(scale), "-h", address, "-U", USER, USER])


def sums(client: Host, address: str) -> tuple[bool, str]:
    """Whether all are the same, and what the server says: how many different ones, of how many.
    Raises LabError."""
    said = client.run(["psql", "-At", "-h", address, "-U", USER, "-c", _SUMS]).stdout.strip()
    return said == "1|4", f"sums: {said}"
