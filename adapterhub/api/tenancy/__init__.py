"""Whose key may do what, how much, and how much they did: plain data and the database, without FastAPI."""
