"""Groups of commands of the command line, one module each; `migrate/cli.py` puts them together."""
