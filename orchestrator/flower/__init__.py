"""Flower: its strategies as ours, and ours as its."""
