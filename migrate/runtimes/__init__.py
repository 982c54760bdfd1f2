"""Drivers of container runtimes."""
