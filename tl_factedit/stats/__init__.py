"""Second moments of keys."""
