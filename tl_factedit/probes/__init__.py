"""Probes: values that turn (model, facts) into a `Reading`. One method a file."""
