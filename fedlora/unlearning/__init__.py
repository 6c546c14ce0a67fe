"""Taking a client, a task or records out of what was learned, and the evidence for it."""
