"""Moving bytes between two hosts: frames, compression, TLS streams. Knows nothing of CRIU."""
