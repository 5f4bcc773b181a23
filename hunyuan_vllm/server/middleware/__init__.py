"""ASGI middleware around vLLM's application; `stack` has its order"""
