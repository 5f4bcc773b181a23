"""Fine-tuning: full and LoRA, from one CPU to many nodes, and back into the server."""
