"""What may be claimed of a removal. A certificate names the level that was reached, never a higher one."""

from collections.abc import Mapping

LEVELS: Mapping[str, str] = {
    "E1": "Exact: what is left is byte for byte a run that never had the target.",
    "E2": "Exact in distribution: what is left could as well have come from retraining without the target.",
    "C": "Certified: what is left is within a stated (epsilon, delta) of retraining without the target.",
    "A": "Approximate: tests found no trace of the target beyond the control's; there is evidence and no proof.",
    "S": "Suppression: the target no longer shows in the outputs, and its data is still in the weights. No erasure.",
}
ERASES = frozenset(
    {"E1", "E2", "C"}
)  # what may be called erasure; after A and S the same target may be asked for again

# what a certificate adds about what nobody looked at
UNPROVED: Mapping[str, tuple[str, ...]] = {
    "A": ("The checks see what the rows they looked at can show; traces that none of them looks for may be there.",),
    "S": (
        "Nothing was measured: no control was trained, and the data of the target is to be taken as still in the"
        " weights. This is suppression, not erasure.",
    ),
}
