"""Several machines as one: their accounts' SSH access to each other."""
