"""The pure core of the wire: frame layout and page de-duplication. No I/O, no clock."""
