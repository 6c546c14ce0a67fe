"""What keeps clients from being seen: what noise costs, and sums whose terms nobody learns.

The noise of client-level differential privacy is a wrapper, ``fedlora.aggregation.dp``.
"""
