"""Client runtimes: what turns a task into an update."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when Flower is imported: nothing leaves this machine
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
