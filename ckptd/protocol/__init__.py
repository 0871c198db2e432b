"""State machines of snapshots, slots and epochs: events and time in, actions out; no I/O, clock or randomness."""
