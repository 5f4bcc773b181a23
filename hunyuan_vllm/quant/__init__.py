"""Quantised weights and caches: int8 weight-only, int8 W8A8, and W8A8C8-FP8."""
