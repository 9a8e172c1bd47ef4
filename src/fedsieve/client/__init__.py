"""What a client computes: its training, on a mask or without, and what that costs."""
