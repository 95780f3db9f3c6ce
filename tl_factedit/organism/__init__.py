"""A small model whose facts are known exactly."""
