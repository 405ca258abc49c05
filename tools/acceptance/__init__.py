"""Measures on a machine what could not be measured where this was written. Itself standard library only."""
