"""The per-node process that owns snapshot memory, and the client through which trainers and the CLI reach it."""
