"""Training: data → autoencoder → teacher → pairs → reflow → distill. Import it as ``edgeflow.training``."""
