"""Dirty trackers: which pages were written since the last round."""
