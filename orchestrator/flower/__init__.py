"""Flower: the app and the link that carry a run, keys, and the way between its strategies and ours."""
