"""The converter: a BF16 checkpoint in, an FP8 or int8 checkpoint out, one tensor at a time."""
