"""Editors: values that turn (model, facts) into an `Edit`. One method a file."""
