"""Compares the ways to move a running container, on the same hosts, in one run.

    cases.py     what is measured: the matrix
    systems.py   the interface of a way to move a container
    dolly.py     ours: migrate and clone
    by_runc.py   stop-and-copy, and CRIU's own post-copy, as shell scripts around runc
    by_podman.py Podman's checkpoint, export and restore
    run.py       one measurement, from the outside, as one line of JSON
    cost.py      what that took of the hosts
    tables.py    medians and percentiles of those lines
    plots.py     the same as pictures; plots_of_moves.py draws single moves

`python -m bench` runs it; `python -m bench report` makes docs/bench of what was measured.
"""
