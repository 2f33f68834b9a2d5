"""Sweeps: many configurations of one experiment, chosen by what the ones before reached on val."""
