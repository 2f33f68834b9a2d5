"""Studies: many arms, seeds and variants of the data, trained once and reported together."""
