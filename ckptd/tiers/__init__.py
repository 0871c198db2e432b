"""Places that hold chunks: the arena in memory and the stores. Each answers `catalog()` and `read(row, into)`."""
