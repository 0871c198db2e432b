"""The `ckptd` command: one file a command, which parses arguments, calls a layer below, and prints. No torch."""
