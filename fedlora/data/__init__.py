"""Rows: reading them, dividing them into clients, turning them into tokens."""
