"""An ordinary model as a list of layers: traced, recognised, and fused for inference."""
