"""Speed of a checkpoint, of its layers, and of a kernel that the user brings."""
