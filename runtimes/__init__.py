"""Runtimes: each opens a bundle and maps named arrays to named arrays. Import it as ``edgeflow.runtimes``."""
