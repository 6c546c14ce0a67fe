"""The control plane: rounds, pools, what a run leaves behind, and the command line."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when Flower is imported: nothing leaves this machine
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
