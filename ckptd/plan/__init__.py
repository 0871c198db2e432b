"""What to move, computed before any byte moves. Pure functions on catalogs."""
