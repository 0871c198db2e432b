"""The universal checkpoint format as bytes: chunks, objects, manifest, COMMIT. No I/O. Specified in docs/format.md."""
