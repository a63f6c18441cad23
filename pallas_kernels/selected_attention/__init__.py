"""Attention over the keys of chosen blocks."""
