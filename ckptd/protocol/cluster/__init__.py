"""Protection by several nodes: what their daemons agree on (docs/protocol.md, section 11). Pure."""
