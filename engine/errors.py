"""Errors that loading a model raises; both are about a value the user chose."""


class UnsupportedModelError(ValueError):
    """The model exists but cannot be served; the message names the model and each reason."""


class ModelNotFoundError(ValueError):
    """No model at the given source; the message names the source and the remedy."""
