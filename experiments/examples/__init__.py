"""Short scripts to copy from, each of which runs in seconds on a CPU."""
