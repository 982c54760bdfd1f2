"""What runs inside the containers of tests, demo and bench."""
