"""What is known of a feature, as HTML: examples, density, promoted tokens, causal numbers."""
