"""Slow, literal copies of published formulas: what the package's own code is compared with."""
