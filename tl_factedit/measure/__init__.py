"""How a model is measured before and after a change."""
