"""Adapters as values: what a LoRA update is, its algebra, and its bytes."""

from fedlora.adapter.state import AdapterState, LowRank

__all__ = ["AdapterState", "LowRank"]
