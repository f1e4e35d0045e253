"""What the engine and the references of the operators both compute: pure functions on tensors."""
