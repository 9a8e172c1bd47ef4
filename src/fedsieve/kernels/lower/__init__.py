"""From layers to operations: of a training step, of a forward pass, and of one operation alone."""
