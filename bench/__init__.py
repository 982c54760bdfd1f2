"""Lab, workloads, demo and measurements."""
