"""slimray: efficient deep learning from 2D to 3D on Ray; one YAML from raw data to a small, fast network."""

__version__ = "0.1.0"
