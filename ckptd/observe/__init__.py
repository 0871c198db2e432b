"""What the runtime says of itself: logs, traces."""
