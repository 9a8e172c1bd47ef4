"""What runs operations: the native library, its structures, programs, and the memory of their maps."""
