"""A table of runs: what is in it (plan), its cells (run), what they say (table) and how it looks (figure)."""
