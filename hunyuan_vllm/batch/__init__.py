"""The batch runner: a JSONL file of requests in, a JSONL file of answers out, resumable at any moment.

lines → requests → runner (engine) → records → output; cli/batch.py puts them together.
"""
