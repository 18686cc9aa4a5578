"""The model card: what the model is, how it is used, how good it is, and where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsl.errors import VocabularyError
from infra import registry, tracking
from infra.documents import from_json
from infra.errors import DataError
from infra.storage import Folder
from pipelines.kinds import AR, DSL, KINDS, MDLM
from pipelines.models import Model

UNKNOWN = "not recorded"
SECTIONS = (
    "Texts",
    "Likelihood of held-out text",
)  # of an evaluation's report, that the card shows
REPORT = "evaluation.md"
NOT_EVALUATED = "Evaluate the model before you rely on it."
TRAINED_AS = {
    DSL.name: "a denoiser for every SNR (Discrete Stochastic Localization)",
    MDLM.name: "a masked-diffusion model, not trained on finite SNR: give it endpoint paths",
    AR.name: "an autoregressive model, which reads from left to right",
}
CARD = """\
---
{head}
---
# {title}

This is {trained_as}: {parameters:,} parameters, {tokens:,} tokens, rows of {length} tokens.
It needs `torch` and `transformers`, and no other code: `modeling_dsl.py` holds all of it.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

name = "{name}"
model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)

ids = model.generate(rows=4{size}, seed=0)  # free texts
prompt = tokenizer("{prompt}", return_tensors="pt", add_special_tokens=False).input_ids
ids = model.generate(prompt, rows=4{size})  # what follows a prompt
{draft}print(tokenizer.batch_decode(ids))
```

Every `{mask}` of a text is a token to draw. `generate` walks `{path}`
{calls} unless `path` and `budget` say otherwise; `seed` makes texts repeatable. `model(ids).logits`
are the predictions at masked positions.

## Evaluation

{evaluation}

## Where it comes from

{origin}

## Limits

- Rows have one length; there is no padding. Longer rows than those of training are unexplored.
- The model repeats what its data says, whether true, private or offensive. No filter is applied.
- Likelihoods are {likelihoods}, and judges' figures are those of the judges that the table names.
- `trust_remote_code=True` runs `modeling_dsl.py`: read it first, or pin a `revision`.
"""
DRAFT = "ids = model.generate(prompt, snr=2.0)  # a draft, which the model may correct\n"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of how a model was made; empty where nothing is."""

    version: str | None = None
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)  # `name` and `digest`
    report: str | None = None  # the folder of the report of its evaluation


def provenance(address: str, uri: str) -> Provenance:
    """From the registry and MLflow, or from the records of a run directory."""
    if address.startswith("models:/"):
        return _registered(address, uri)
    folder = Folder.at(address)
    if not folder.exists(tracking.RECORD):
        return Provenance()
    try:
        record = from_json(folder.read_bytes(tracking.RECORD))
        run_id, tags, data = record["run_id"], dict(record["tags"]), dict(record["dataset"] or {})
    except (ValueError, KeyError, TypeError) as error:
        where = folder.url_of(tracking.RECORD)
        raise DataError(where, f"no record of a run ({error})", "Copy the run again") from error
    return Provenance(run_id=run_id, tags=tags, data=data)


def _registered(address: str, uri: str) -> Provenance:
    from mlflow.exceptions import MlflowException

    version = registry.describe(address, uri)
    tags, data = {}, {}
    try:
        run = tracking.connect(uri).get_run(version.run_id)
        tags = run.data.tags
        data = next((dict(given.dataset) for given in run.inputs.dataset_inputs), {})
        data |= json.loads(data.get("profile") or "{}")
    except MlflowException:  # the run was deleted, the model was kept
        pass
    page = version.tags.get("evaluation_report")
    report = page.rpartition("/")[0] if page else None
    return Provenance(
        version=version.uri, run_id=version.run_id, tags=tags, data=data, report=report
    )


def evaluation(report: str | None) -> str:
    """The tables of a report that a card shows."""
    if report is None:
        return f"No evaluation is recorded. {NOT_EVALUATED}"
    folder = Folder.at(report)
    if not folder.exists(REPORT):
        return f"The report of the evaluation is no longer at {folder.url}. {NOT_EVALUATED}"
    text = folder.read_bytes(REPORT).decode()
    subtitle = text.partition("\n\n")[2].partition("\n\n")[0]
    sections = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    found = zip(sections[::2], sections[1::2], strict=True)
    shown = [f"### {title}\n{body.rstrip()}" for title, body in found if title in SECTIONS]
    return "\n\n".join([subtitle, *shown])


def card(
    model: Model,
    *,
    title: str,
    name: str,
    mask: str,
    generation: Mapping[str, Any],
    source: Provenance,
    report: str | None,
    licence: str | None,
) -> str:
    """The text of `README.md`. name: by which strangers load it. licence: of the base's weights."""
    tags, kind = source.tags, KINDS[model.kind]
    rows = {
        "Model": source.version or model.address,
        "Run": source.run_id or UNKNOWN,
        "Commit": _commit(tags),
        "Data": source.data.get("name", UNKNOWN),
        "Data digest": source.data.get("digest", UNKNOWN),
        "Base": tags.get("parent_model", "none: it was trained from scratch, or not recorded"),
        "Licence of the base": licence or f"{UNKNOWN}: ask whoever published the base",
        "Licence of the code": "Apache-2.0",
    }
    head = {
        **({"license": licence} if licence else {}),
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": json.dumps(["masked-diffusion", "discrete-stochastic-localization"]),
    }
    budget = generation.get("budget")
    return CARD.format(
        head="\n".join(f"{key}: {value}" for key, value in head.items()),
        title=title,
        trained_as=TRAINED_AS[model.kind],
        parameters=sum(parameter.numel() for parameter in model.denoiser.parameters()),
        tokens=model.denoiser.config.backbone.tokens,
        length=model.length or "unknown",
        name=name,
        mask=mask,
        size="" if model.length else ", length=64",
        prompt=_prompt(model),
        draft=DRAFT if kind.finite_snr else "",
        likelihoods="exact" if kind.causal else "upper bounds",
        path=json.dumps(generation["path"]),
        calls=f"in at most {budget} calls" if budget else "in one call for each token",
        evaluation=evaluation(report),
        origin=_table(rows),
    )


def _prompt(model: Model) -> str:
    """A beginning of a text that the vocabulary can spell."""
    assert model.vocabulary is not None
    try:
        model.vocabulary.encode(["The "])
    except VocabularyError:
        return "the "
    return "The "


def _commit(tags: Mapping[str, str]) -> str:
    commit = tags.get("commit", UNKNOWN)
    return (
        f"{commit}, with changes that were not committed" if tags.get("dirty") == "true" else commit
    )


def _table(rows: Mapping[str, str]) -> str:
    cells = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
