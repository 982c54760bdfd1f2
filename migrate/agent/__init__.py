"""The daemon of a host that receives containers."""
