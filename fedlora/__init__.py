"""FedLoRA: federated fine-tuning with LoRA adapters of different ranks."""

__version__ = "0.1.0"
