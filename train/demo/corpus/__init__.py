"""The text the demo model learns from: facts, small talk, checkable tasks and prose, written or generated here."""
