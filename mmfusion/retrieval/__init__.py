"""Exact search over the corpus, metrics with the true ideal, intervals, tables."""
