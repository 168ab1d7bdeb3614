"""Exporters: each lowers one ``torch.export`` program into a backend's artifact."""
