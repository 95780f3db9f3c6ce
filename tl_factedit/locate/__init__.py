"""Where is a fact recalled? Causal tracing."""
