"""The model that the registry stores: text in, text out, along any path.

    model = mlflow.pyfunc.load_model("models:/dsl-quickstart@candidate")
    model.predict(["The ", "The ____ of a list"], params={"path": "masked", "seed": 1})

This file travels with the weights and with `dsl`, and is run where nothing else of the
repository exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature, set_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import dsl
from dsl import conditioning, weights
from dsl.errors import TextError, VocabularyError
from dsl.foreign import ForeignBackbone
from dsl.paths import choose, from_dict
from dsl.precision import dtype_of
from dsl.truncation import Truncated

# What `predict` takes beside the texts. No path, and a budget or a length of 0, ask for the
# defaults of `dsl.paths.choose` and the length of the rows that the model was trained on.
PARAMS: dict[str, tuple[DataType, Any]] = {
    "path": (DataType.string, ""),  # a kind, or a mapping with its settings as JSON
    "budget": (DataType.long, 0),
    "seed": (DataType.long, 0),
    "length": (DataType.long, 0),
    "mode": (DataType.string, "infill"),
    "snr": (DataType.double, 2.0),
    "temperature": (DataType.double, 1.0),
    "nucleus": (DataType.double, 1.0),
    "convention": (DataType.string, "keep"),
    "batch": (DataType.long, 16),
    "precision": (DataType.string, "auto"),  # of the network: bfloat16 on a GPU, else float32
}
SIGNATURE = ModelSignature(
    # No inputs: MLflow would refuse lists of texts for one with a name, and hand on the first
    # column alone for one without.
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema([ParamSpec(name, *spec) for name, spec in PARAMS.items()]),
)


class TextModel(mlflow.pyfunc.PythonModel):
    """Generates, infills and corrects; see `dsl.conditioning.read` for what a text asks for."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["model"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # MLflow runs this file, which was registered with the weights: so may code beside it be.
        self.denoiser = dsl.load(folder, trust_remote_code=True).to(device)
        self.causal = self.denoiser.config.backbone.causal
        self.vocabulary = dsl.Vocabulary.load(folder)
        self.length = weights.read_config(folder)["metadata"].get("length")
        backbone = self.denoiser.backbone
        positions = backbone.positions if isinstance(backbone, ForeignBackbone) else None
        # A network without a table of positions may be trained on longer rows than it says.
        self.room = max(positions, self.length or 0) if positions else math.inf

    # No type for the input: MLflow would take it for a schema, and this one has several forms.
    def predict(self, context, model_input, params: Mapping[str, Any] | None = None) -> list[str]:
        """One text for each text: a row's randomness is keyed by the seed and its place."""
        given = {name: default for name, (_, default) in PARAMS.items()} | dict(params or {})
        wanted = read_path(given["path"]) if given["path"] else None
        table_VD = self.denoiser.table_VD
        network = self.denoiser.computing_in(dtype_of(given["precision"], table_VD.device))
        denoiser = Truncated(network, given["temperature"], given["nucleus"], given["convention"])
        rows = [self._read(row, text, given) for row, text in enumerate(texts(model_input))]
        finished: list[str] = []
        for first_row, batch in conditioning.batches(rows, given["batch"]):
            path, budget = choose(wanted, given["budget"], length=len(batch[0]), causal=self.causal)
            sampled = dsl.sample(
                denoiser,
                path,
                conditioning.state(batch, table_VD),
                budget=budget,
                seed=given["seed"],
                first_row=first_row,
            )
            finished += [self.vocabulary.decode(ids) for ids in sampled.tokens_BL.tolist()]
        return finished

    def _read(self, row: int, text: str, given: Mapping[str, Any]) -> conditioning.Given:
        try:
            given_row = conditioning.read(
                text,
                self.vocabulary,
                mode=given["mode"],
                snr=given["snr"],
                length=given["length"] or None,
                otherwise=self.length,
            )
            if len(given_row) > self.room:  # on a GPU the process would not survive its error
                raise TextError(f"it has {len(given_row)} tokens, the model takes {self.room}")
        except (TextError, VocabularyError) as error:
            raise type(error)(f"row {row}: {error}") from error
        return given_row


def texts(model_input: Any) -> list[str]:
    """The texts of a list, of a data frame, or of a mapping or list of mappings with a `text`.

    A data frame has a column `text`, or a single column. A text by itself is a list of one.

    Raises ValueError for what is no text, such as a missing value, and where no column is `text`.
    """
    if isinstance(model_input, pd.DataFrame) and len(model_input.columns) == 1:
        model_input = model_input.iloc[:, 0]
    elif isinstance(model_input, pd.DataFrame | Mapping):
        if "text" not in model_input:
            names = ", ".join(map(str, model_input))
            raise ValueError(f"no column is called text, only {names}; rename the one to read")
        model_input = model_input["text"]
    rows = list(model_input) if pd.api.types.is_list_like(model_input) else [model_input]
    found = [row.get("text") if isinstance(row, Mapping) else row for row in rows]
    # A server makes arrays without a dimension of single values.
    found = [
        text.item() if isinstance(text, np.ndarray) and not text.ndim else text for text in found
    ]
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"row {row}: {text!r} is not a text")
    return found


def read_path(spec: str | Mapping[str, Any]) -> Any:
    """A path by its kind, as a mapping, or as a mapping written in JSON."""
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            spec = json.loads(spec)
        except ValueError as error:
            raise ValueError(f"path: not JSON ({error})") from error
    return from_dict(spec)


set_model(TextModel())
