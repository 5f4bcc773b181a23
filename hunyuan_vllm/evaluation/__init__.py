"""Quality: how far a quantised engine is from the BF16 one, and how well a server does on benchmark tasks."""
