"""The control plane: command line, coordinator on the source, agent on the target."""
