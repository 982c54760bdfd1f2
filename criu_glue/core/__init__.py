"""The pure core: image formats and log reading. No I/O, no clock."""
