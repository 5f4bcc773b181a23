"""Products with quantised weights on CPUs: `w8a16` (weights only) and `w8a8` have the same functions, and `portable.py`
defines what they compute; `fp8` is to check a GPU's.
"""
