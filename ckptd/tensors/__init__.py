"""What torch's tensors and values are to the format, for the three parts that import torch."""
