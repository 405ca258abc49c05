"""What is installed on a machine and what should be. Standard library only: even a broken machine can be looked at."""
