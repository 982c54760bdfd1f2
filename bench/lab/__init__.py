"""Lab hosts: real hosts for tests, demo and bench, on one machine."""
