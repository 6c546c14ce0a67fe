"""Unlearning where it touches run folders: what is asked, what descends from whom, what is certified."""
