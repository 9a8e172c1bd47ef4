"""A Flower app: federated learning on handwritten digits."""
