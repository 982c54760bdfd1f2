"""Hosts of the fleet, from their operator's side: over SSH, before and beside TLS."""
