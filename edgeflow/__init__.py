"""edgeflow: a text-to-image model, down to one step and onto people's own devices."""

__version__ = "0.1.0"
