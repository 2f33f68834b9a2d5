"""Catalogue in, (query, product, photo) tuples out."""
