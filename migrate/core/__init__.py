"""The pure core of the migration: state machines, predictions, messages. No I/O, no clock."""
