"""The core of mtrl: contract, vectorized multi-task environments, training loop, evaluation."""
