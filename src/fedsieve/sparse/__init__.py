"""Which weights stay: exact top-k, layer policies, masks (random, or learnt by prune and regrow), sparse layers."""
