"""What sparsity saves in time and memory, measured: whole training steps and inference, sparse against dense."""
