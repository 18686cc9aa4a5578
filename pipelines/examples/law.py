"""Shards whose law is known: rows drawn from a Markov chain that is fitted to prepared text.

    python -m pipelines.examples.law data=data/small out=data/law order=2

The rows are independent draws, as many for each split as the text has. Models are trained on the
new folder as on any other. `evaluate … law='{}'` then compares their posteriors with the exact one
(`dsl.ChainDenoiser`), and the texts that they draw with those that it draws on the same paths.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dsl import vocabulary as words
from dsl.chain import ChainDenoiser
from infra import cluster, documents, shards, stream
from infra.console import Meter
from infra.errors import ConfigError, DataError
from infra.shards import SPLITS, ShardWriter
from infra.storage import Folder
from pipelines import models, verb

LAW = "law.json"  # beside the manifest; written before it
FITTED = 1 << 16  # rows of the training split that the chain is fitted to
ELEMENTS = 1 << 19  # the most transitions of a chain
AT_ONCE = 1 << 14  # rows that are drawn together, each time with another seed
SEEDS = 1 << 20  # of one configured seed


@dataclass(frozen=True, kw_only=True)
class LawConfig:
    """`data`: prepared shards, whose training split the chain is fitted to. `order`: how many
    tokens the next one depends on, 1 to 3."""

    data: str
    out: str
    order: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")
        if not 0 <= self.seed < 2**43:
            raise ValueError(f"seed must lie in [0, 2^43), got {self.seed}")


def read(data: Folder) -> Callable[[Tensor], ChainDenoiser]:
    """The law of a folder of shards: its exact denoiser for a table of unit rows ``[V, D]``.

    Raises ConfigError where the rows were not drawn from a known law, and DataError where what is
    written of it is none.
    """
    if not data.exists(LAW):
        why = f"{data.url} holds no {LAW}: the law of its rows is not known"
        raise ConfigError("law", why, "Leave law out, or make shards with pipelines.examples.law")
    fix = "Make the shards again"
    found = documents.load(data, LAW, dict[str, Any], fix)
    try:
        initial, transition = (
            torch.tensor(found[name], dtype=torch.float64) for name in ("initial", "transition")
        )
        ChainDenoiser(torch.eye(len(initial)), initial, transition)
    except (KeyError, TypeError, ValueError) as error:
        why = f"is no chain ({type(error).__name__}: {error})"
        raise DataError(data.url_of(LAW), why, fix) from None
    return lambda table_VD: ChainDenoiser(table_VD.cpu(), initial, transition)


def execute(config: LawConfig) -> dict[str, Any]:
    source, out = Folder.at(config.data), Folder.at(config.out)
    manifest = shards.read_manifest(source)
    vocabulary = models.vocabulary_of(manifest, source)
    if vocabulary.size ** (config.order + 1) > ELEMENTS:
        why = f"a chain over {vocabulary.size:,} tokens has more than {ELEMENTS:,} transitions"
        raise ConfigError("order", why, "Take a lower order, or text of a smaller vocabulary")
    rows = min(FITTED, manifest.rows("train"))
    taught_NL = torch.from_numpy(stream.holdout(source, manifest, "train", rows, config.seed))
    law = ChainDenoiser.fit(torch.eye(vocabulary.size), taught_NL, order=config.order)
    about = {
        "vocabulary": manifest.vocabulary,
        "length": manifest.length,
        "source": f"a Markov chain of order {config.order}, fitted to {config.data}",
        "split_rule": "independent draws",
        "blocks": "eos",
        "commit": str(cluster.commit() or ""),
    }
    with ShardWriter(out, **about) as writer:
        out.write_bytes(words.TOKENIZER, source.read_bytes(words.TOKENIZER))
        out.write_bytes(LAW, json.dumps(_probabilities(law)).encode())
        writer.extra |= {"law": asdict(config)}
        wanted = {split: manifest.rows(split) for split in SPLITS if manifest.splits.get(split)}
        seeds = count(config.seed * SEEDS)
        for split, rows in wanted.items():
            sizes = [min(AT_ONCE, rows - first) for first in range(0, rows, AT_ONCE)]
            for size in Meter(f"law {split}", len(sizes), "parts").over(sizes):
                writer.write(split, law.draw(size, manifest.length, next(seeds)).numpy())
    assert writer.manifest is not None
    return {"data": out.url, "digest": writer.manifest.digest, "order": config.order}


def _probabilities(law: ChainDenoiser) -> dict[str, Any]:
    tokens = len(law.table_VD)
    transition = law.probs_VRV.view((tokens,) * (law.order + 1))
    return {"initial": law.initial.exp().tolist(), "transition": transition.tolist()}


def plan(config: LawConfig) -> dict[str, Any]:
    """What would be made, for `--dry-run`."""
    return asdict(config)


def main() -> int:
    return verb.run("law", LawConfig, plan=plan, execute=execute, doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
