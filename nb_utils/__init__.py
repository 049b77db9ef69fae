"""The modules of the book: one noun each."""
