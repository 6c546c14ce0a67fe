"""Taking data out of a model, and the evidence that it is out."""
