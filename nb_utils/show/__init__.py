"""What a reader sees: figures, the evidence for features, widgets and their front end."""
