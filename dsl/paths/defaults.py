"""What a path and a budget are where nobody says, and whether they suit."""

from typing import Any

from dsl.errors import PathError
from dsl.paths.hybrid import Hybrid
from dsl.paths.masked import Masked
from dsl.paths.order import Order
from dsl.paths.stage import Stage

LEFT_TO_RIGHT = Order("left_to_right")


def choose(
    path: Stage | Hybrid | None, budget: int | None, *, length: int, causal: bool
) -> tuple[Any, int]:
    """The path to walk and the calls to spend on rows of ``length`` tokens.

    By default a causal denoiser goes from left to right and any other takes `Masked`; a `Hybrid`
    gets the calls that it splits and any other path one per token.

    Raises:
        PathError: a causal denoiser is asked for another order, or the calls are not those of
            the split.
    """
    path = path or (LEFT_TO_RIGHT if causal else Masked())
    if causal and path != LEFT_TO_RIGHT:
        raise PathError(
            f"an autoregressive model reads from left to right, but the path is {path.kind}; "
            "leave the path out"
        )
    if not isinstance(path, Hybrid):
        return path, budget or length
    calls = sum(path.split)
    if budget and budget != calls:
        before, after = path.split
        raise PathError(
            f"the path splits {before} + {after} = {calls} calls but the budget is {budget}; "
            "leave the budget out"
        )
    return path, calls
