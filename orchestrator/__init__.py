"""The control plane: rounds, pools, what a run leaves behind, and the command line."""
