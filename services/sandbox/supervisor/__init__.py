"""One process a slot: starts the jails, runs one job at a time, measures and decides."""
