"""Before the first part: checks everything that could be wrong, and writes what parts need into the
run directory, where a restart finds it as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

import numpy as np

from dsl.precision import dtype_of
from infra import documents, registry
from infra.errors import ConfigError, DataError
from infra.storage import Folder
from pipelines.evaluation import held_out, promotion, subjects
from pipelines.evaluation.cells import CHAMPION, REAL, REFERENCES, UNIGRAM
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.parts import Parts, matrix, texts
from pipelines.evaluation.settings import EvaluateConfig
from pipelines.evaluation.subjects import Origin, Subject
from pipelines.evaluation.survey import Survey
from pipelines.evaluation.workspace import MODELS, Workspace, copied, device_of

READERS = "readers.json"  # the models of our own that read the texts of others
DEVICE = "device.json"  # what parts are made on, and in which dtype
SUBJECTS = "subjects.json"  # written last: where it is, all that a restart needs is there
# What to do without one of them: a new one would name today's models beside parts of earlier ones.
ANEW = "existing=restart makes the evaluation anew"


def origins(config: EvaluateConfig, uri: str) -> dict[str, Origin]:
    """Where every model comes from; with a gate, the present champion stands among them.

    Where this evaluation has already made its candidate the champion, the other models are those
    that it was compared with.
    Raises ConfigError for a candidate that is not in the registry, DataError for what is missing.
    """
    found = {
        name: subjects.origin(f"models.{name}", address, uri=uri, root=config.root)
        for name, address in config.models.items()
    }
    if config.gate:
        candidate = found[config.gate.model]
        if "version" not in candidate:
            why = f"{candidate['address']} is not in the registry, so no alias can point at it"
            raise ConfigError(f"models.{config.gate.model}", why, "Name a models:/name@candidate")
        champion = registry.get_alias(candidate["name"], CHAMPION, uri)
        is_champion = champion and champion.uri == candidate["version"]
        if is_champion and promotion.decided(config.folder):
            earlier = {subject.name: subject.origin for subject in _before(config.folder)}
            return {**earlier, config.gate.model: candidate}
        if champion and not is_champion:
            where = f"models.{CHAMPION}"
            found[CHAMPION] = subjects.origin(where, champion.uri, uri=uri, root=config.root)
    return found


def rows(config: EvaluateConfig) -> HeldOut:
    """The rows to be asked about, behind them others for `real`, if the split has so many."""
    wanted = config.held_out_rows
    manifest = held_out.require(config.data, config.split, wanted)
    most = max(wanted.values()) + config.samples.rows
    return held_out.read(
        config.data,
        config.split,
        min(most, manifest.rows(config.split)),
        corpus_rows=config.corpus_rows,
        seed=config.seed,
    )


def prepare(
    config: EvaluateConfig, origins: Mapping[str, Origin], rows: HeldOut, uri: str
) -> Survey:
    """The evaluation, once all models are known to fit; their weights and the texts beside them are
    copied into the run directory, unless an earlier attempt has done so. Parts that follow from the
    data are written where they are missing, whoever has removed them.

    Raises ConfigError where that attempt found other versions of the models, or computed elsewhere,
    and DataError where it has left parts of models, and nothing that says of which.
    """
    folder = config.folder

    def survey(subjects: Sequence[Subject], readers: Sequence[Subject]) -> Survey:
        return Survey(
            config=config, parts=Parts(folder), held_out=rows, subjects=subjects, readers=readers
        )

    if folder.exists(SUBJECTS):
        before = _before(folder)
        require_same({subject.name: subject.origin for subject in before}, origins, folder)
        made = survey(before, _before(folder, READERS))
        _write_parts(made)
        return made
    _require_no_parts(config)
    for question in config.questions:
        question.require(config, rows, uri)
    read_by = {
        address: f"{key}.model"
        for key, reader in config.readers.items()
        for address in reader.addresses()
    }
    reading = {
        copied(address): subjects.origin(where, address, uri=uri, root=config.root)
        for address, where in sorted(read_by.items())
    }
    wheres = {copied(address): where for address, where in read_by.items()}
    made = survey(
        _copy_models(config, origins, rows, uri),
        _copy_models(config, reading, rows, uri, wheres),
    )
    (folder / MODELS).write_bytes("tokenizer.json", rows.vocabulary.to_json().encode())
    promotion.require(made)
    _write_parts(made)
    for name, copies in ((READERS, made.readers), (SUBJECTS, made.subjects)):
        content = json.dumps([asdict(subject) for subject in copies], indent=1)
        folder.write_bytes(name, content.encode())
    return made


def _before(folder: Folder, name: str = SUBJECTS) -> list[Subject]:
    """The models as an earlier attempt has copied them into the run directory."""
    subjects: list[Subject] = documents.load(folder, name, list[Subject], ANEW)
    return subjects


def _require_no_parts(config: EvaluateConfig) -> None:
    """DataError for parts that do not follow from the data alone."""
    folder, beside = config.folder, {REFERENCES, *config.beside}
    measured = folder / "parts"
    for groups in (folder / "samples", *(measured / name for name in measured.names())):
        if set(groups.names()) - set(groups.files()) - beside:
            why = f"not there, though {groups.url} holds parts of models"
            raise DataError(folder.url_of(SUBJECTS), why, ANEW)


def _copy_models(
    config: EvaluateConfig,
    origins: Mapping[str, Origin],
    rows: HeldOut,
    uri: str,
    wheres: Mapping[str, str] = MappingProxyType({}),
) -> list[Subject]:
    """wheres: by name, the dotted paths of the settings that name what is none of the `models`."""
    return [
        subjects.freeze(
            name,
            origin,
            rows,
            config.folder / MODELS,
            where=wheres.get(name, f"models.{name}"),
            converter=config.converter,
            uri=uri,
            trust_remote_code=config.trust_remote_code,
        )
        for name, origin in origins.items()
    ]


def require_same(before: Mapping[str, Origin], now: Mapping[str, Origin], folder: Folder) -> None:
    """ConfigError unless an evaluation is of the very models that are meant now, as far as it has
    written down what they were. The run that made a model may be archived meanwhile."""
    pairs = ((before[name], now[name]) for name in before.keys() & now.keys())
    same = (_versioned(earlier).items() <= _versioned(later).items() for earlier, later in pairs)
    if before.keys() != now.keys() or not all(same):
        raise ConfigError(
            "name",
            f"{folder.url} is an evaluation of other versions of these models",
            "Choose another name, or existing=restart to wipe it",
        )


def _versioned(origin: Origin) -> Origin:
    """What of an origin says which weights these are."""
    return {key: value for key, value in origin.items() if key not in ("run", "run_id")}


def require_same_device(config: EvaluateConfig) -> None:
    """ConfigError where other parts were made on another kind of device, or in another dtype: both
    depend on `workers`, and parts of one evaluation compare. The first call writes them down."""
    folder, device = config.folder, device_of(config.workers)
    dtype = str(dtype_of(config.precision, device)).removeprefix("torch.")
    now = f"{device.type}, {dtype}"
    if not folder.exists(DEVICE):
        folder.write_bytes(DEVICE, json.dumps(now).encode())
    before: str = documents.load(folder, DEVICE, str, ANEW)
    if now != before:
        raise ConfigError(
            "workers.gpu",
            f"{now} here, but {before} in the parts that {folder.url} has so far",
            "Set it as it was, choose another name, or existing=restart to wipe it",
        )


def require_same_rows(survey: Survey) -> None:
    """ConfigError unless the data still holds the rows that earlier parts were asked about, as many
    in each part as there were."""
    config, parts, group = survey.config, survey.parts, f"samples/{REFERENCES}"
    now_NL = survey.held_out.rows_NL[: max(config.held_out_rows.values())]
    for first in parts.present(group):
        kept_NL = matrix(parts.one(group, first, ["tokens"])["tokens"], np.int64)
        if not np.array_equal(kept_NL, now_NL[first : first + config.batch]):
            raise ConfigError(
                "data",
                f"{config.data} has changed since {config.folder.url} was begun",
                "Choose another name, or existing=restart to wipe it",
            )


def _write_parts(survey: Survey) -> None:
    """Write what other parts begin with, as far as it is not there, beside what goes with it."""
    require_same_device(survey.config)
    require_same_rows(survey)
    workspace = Workspace(survey.config)
    _write_texts(workspace, survey.held_out)
    for question in survey.config.questions:
        question.prepare(workspace, survey.held_out)


def _write_texts(workspace: Workspace, rows: HeldOut) -> None:
    """What stands beside the models, as if it had been drawn: the references, more real text, and
    independent tokens."""
    config, held_out_NL = workspace.config, rows.rows_NL
    count, asked = config.samples.rows, max(config.held_out_rows.values())
    # Where the split has too few rows for both, the references are the real text as well.
    real_NL = held_out_NL[asked:] if len(held_out_NL) == asked + count else held_out_NL[:count]
    length, independent = rows.manifest.length, count * config.samples.repeats
    sources = {
        REFERENCES: held_out_NL[:asked],
        REAL: real_NL,
        UNIGRAM: rows.unigram.draw(independent, length, config.seed),
    }
    for source, tokens_NL in sources.items():
        group = f"samples/{source}"
        for first, size in workspace.parts.missing(group, len(tokens_NL), config.batch):
            table = texts(tokens_NL[first : first + size], first, rows.vocabulary)
            workspace.parts.write(group, first, table, {})
