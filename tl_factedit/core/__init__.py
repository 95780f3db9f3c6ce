"""Facts, tokens, numbers with intervals, linear algebra, files: what needs no model."""
