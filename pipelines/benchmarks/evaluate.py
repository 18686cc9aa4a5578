"""MAUVE's features by our batched featurizer, against mauve-text's own, one text at a time.

Shapes: N texts, L positions, F features.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsl.vocabulary import END_OF_TEXT, Vocabulary
from infra import parallel
from pipelines.benchmarks.measure import interleaved
from pipelines.benchmarks.results import Bar, ratio, table
from pipelines.benchmarks.settings import BenchmarkConfig, FeaturesConfig
from pipelines.corpus import embedded
from pipelines.evaluation.features import HubFeaturizer
from pipelines.report import Table


def run(config: BenchmarkConfig) -> Table:
    size, device = config.evaluate, parallel.device()
    with tempfile.TemporaryDirectory() as folder:
        network, tokenizer = save(Path(folder), size)
        network = network.to(device).eval()
        texts = written(tokenizer, size)
        ours = HubFeaturizer(model=folder, max_tokens=size.max_tokens, batch=size.batch)
        featurize = ours.load("evaluate", device)
        sides = {
            "ours": lambda number: featurize(texts, np.empty((len(texts), 0))),
            "mauve_text": lambda number: one_by_one(network, tokenizer, texts),
        }
        timed = interleaved(sides, config.rounds, device)
    bar = Bar("≥", 5.0 if device.type == "cuda" else 1.5, here=size == FeaturesConfig())
    ours_R, theirs_R = (len(texts) / timed[name] for name in ("ours", "mauve_text"))
    what, against = "MAUVE features", "mauve-text, one at a time"
    note = (
        f"{size.texts} texts of 1 to {size.max_tokens} tokens; a GPT-2 of {size.blocks} blocks of "
        f"width {size.width} with random weights; {size.batch} texts at a time."
    )
    row = ratio("features", what, against, ours_R, theirs_R, unit="texts/s", bar=bar)
    return table("Evaluate", note, [row])


def one_by_one(network: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Features ``[N, F]`` by mauve-text's own function, without its progress bar."""
    from mauve import utils

    ids = [torch.tensor([tokenizer.encode(text)]) for text in texts]
    with redirect_stderr(io.StringIO()):
        return utils.featurize_tokens_from_model(network, ids, batch_size=1).numpy()


def save(folder: Path, size: FeaturesConfig) -> tuple[Any, Any]:
    """A random GPT-2 and a byte-level BPE, and both saved in a folder as `transformers` does."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(Vocabulary.train_bpe(embedded(), 512).to_json()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=size.max_tokens,
    )
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=size.max_tokens,
        n_embd=size.width,
        n_layer=size.blocks,
        n_head=size.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    torch.manual_seed(0)
    network = GPT2Model(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network, tokenizer


def written(tokenizer: Any, size: FeaturesConfig) -> list[str]:
    """Texts of 1 to `max_tokens` tokens in random order."""
    ids = [id for text in embedded() for id in tokenizer.backend_tokenizer.encode(text).ids]
    lengths_N = np.linspace(1, size.max_tokens, size.texts).astype(int)
    np.random.default_rng(0).shuffle(lengths_N)
    starts_N = np.cumsum(lengths_N) - lengths_N
    return [tokenizer.decode(ids[a : a + n]) for a, n in zip(starts_N, lengths_N, strict=True)]
