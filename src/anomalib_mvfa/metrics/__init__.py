"""Metrics, and how far to trust them."""
