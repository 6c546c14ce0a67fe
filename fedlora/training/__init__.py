"""Local training: the base model, batches, the loop of one client, evaluation."""
