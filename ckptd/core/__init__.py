"""Words that every layer shares: errors, types, boxes, the catalog, configuration. Pure; numpy only."""
