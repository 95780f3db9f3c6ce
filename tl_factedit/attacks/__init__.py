"""Ways back to the old object. One attack a file."""
