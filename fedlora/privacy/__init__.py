"""Differential privacy: what a run costs. The mechanism itself is a wrapper, ``fedlora.aggregation.dp``."""
