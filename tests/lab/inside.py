"""Run the project's own functions inside a lab host, as its programs would."""

from __future__ import annotations

import json
from typing import Any

from bench.lab.host import Host
from bench.probe_process import PYTHON_INSIDE

PRELUDE = """\
import json, sys
from pathlib import Path
import msgspec

def answer(value):
    print(msgspec.json.encode(value, enc_hook=str).decode())

given = json.loads(sys.argv[1])
"""


def inside(host: Host, script: str, given: object = None, *, timeout_s: float = 60.0) -> Any:
    """What `script` gives to `answer(...)` on `host`, parsed; `given` is there by that name.

    A script that fails raises LabCommandError with its traceback.
    """
    command = ["python3", "-c", PRELUDE + script, json.dumps(given)]
    done = host.run(command, env=PYTHON_INSIDE, timeout_s=timeout_s)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None
