"""Errors that a caller can correct. Each is one message: where, why, what to do."""


class WeightsError(ValueError):
    """A weights file or folder that cannot be taken as the model it should be."""


class AdaptationError(ValueError):
    """A pretrained model that does not fit the request, or that needs a further option to do so."""


class PathError(ValueError):
    """A path that does not fit the length of the text, the budget or the model."""


class TextError(ValueError):
    """A text too long for its row, or a row of unknown length."""


class VocabularyError(ValueError):
    """A tokenizer file that cannot be used, or text outside a closed vocabulary."""
