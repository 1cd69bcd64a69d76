"""The mathematics: pure functions of tensors, which know nothing of graphs or modules."""
