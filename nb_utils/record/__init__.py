"""What a result is stored as: a table that knows what it comes from."""
