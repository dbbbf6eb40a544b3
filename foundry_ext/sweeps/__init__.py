"""Grid and random sweeps of runs on this machine."""
