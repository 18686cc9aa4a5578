"""Errors that a caller can correct. Each is one message: where, why, what to do."""


class WeightsError(ValueError):
    """A weights file or folder that cannot be taken as the model it should be."""


class AdaptationError(ValueError):
    """A model that cannot be taken in the way that was asked for, or only if that is said."""


class PathError(ValueError):
    """A path that cannot be walked over such a text, or in so many calls."""


class TextError(ValueError):
    """A text that does not fit the row it is given for."""


class VocabularyError(ValueError):
    """A tokenizer file that cannot be used, or text outside a closed vocabulary."""
