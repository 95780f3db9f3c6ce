"""The only package that knows TransformerLens."""
