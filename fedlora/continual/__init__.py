"""Streams of tasks: whose turn it is, when to freeze, what protects, and what was forgotten."""
