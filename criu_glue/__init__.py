"""Everything that touches CRIU, its images and the memory of tasks. Knows no network."""
