"""Where changes come from: one interface, many sources."""
