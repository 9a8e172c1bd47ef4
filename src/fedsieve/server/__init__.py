"""What a server computes: means, optimizer steps, and which updates it accepts."""
