"""Attention over the last keys."""
