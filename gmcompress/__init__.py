"""gmcompress: make a trained PyTorch network smaller with group matrices."""
