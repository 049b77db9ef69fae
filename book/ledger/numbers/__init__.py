"""The numbers that decide the claims, one module a part of the book, or a chapter of it."""
