"""The problems that a caller can mend. Each is one message: where, why, what to do."""


class WeightsError(ValueError):
    """A weights file or folder that cannot be taken as the model it should be."""


class VocabularyError(ValueError):
    """A tokenizer file that cannot be used, or text outside a closed vocabulary."""
