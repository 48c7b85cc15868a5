"""vlmgraft: give a vision-language model the reasoning of a text model of its family, without losing sight."""

__version__ = "0.1.0.dev0"
