"""Starting vLLM's OpenAI server for a Hunyuan model: what to start (settings, machine, launch) and how (child)."""
