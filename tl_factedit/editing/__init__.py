"""What an edit is, and what every editor shares."""
