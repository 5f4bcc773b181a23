"""Products with int8 weights on CPUs: weight-only (`w8a16`) and with int8 activations (`w8a8`), by the same functions.

`operators.py` says what they take; `portable.py` defines what they compute.
"""
