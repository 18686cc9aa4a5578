"""The paths that can be one stage of a longer one."""

from dsl.paths.entropy_bounded import EntropyBounded
from dsl.paths.masked import Masked
from dsl.paths.order import Order
from dsl.paths.remask import Remask
from dsl.paths.second_order import SecondOrder
from dsl.paths.sentence_sde import SentenceSDE
from dsl.paths.token_sde import TokenSDE

Stage = Masked | Remask | Order | EntropyBounded | SentenceSDE | TokenSDE | SecondOrder
