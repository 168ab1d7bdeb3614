"""The checkpoints shipped in the package: one diffusers folder per name."""
