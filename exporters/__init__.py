"""Exporters: each lowers one ``torch.export`` program into a backend's artifact. Import as ``edgeflow.exporters``."""
