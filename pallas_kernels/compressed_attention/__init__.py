"""Attention over block means."""
