"""Measures what training did to the weights."""
