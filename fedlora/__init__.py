"""FedLoRA: federated fine-tuning with LoRA adapters of different ranks."""

import logging

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel at every import
