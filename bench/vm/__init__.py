"""Virtual machines as hosts of a lab: Debian's own kernel, emulated in software, and systemd."""
