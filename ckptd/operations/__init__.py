"""Work on whole checkpoints, without torch: verify, diff, prune, reshard."""
