"""Chatting with a served model in a terminal: what is asked (conversation, client) and how it is typed (terminal)."""
