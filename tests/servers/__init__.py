"""Real servers for tests, started on this machine: nothing listens beyond it, and nothing is left behind."""
