"""Before the first job: everything that could be wrong is looked at, and what jobs need is laid
into the run directory, where a restart finds it as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pyarrow as pa

from infra import documents, registry
from infra.errors import ConfigError
from infra.storage import Folder
from pipelines.evaluation import held_out, jobs, promotion, subjects
from pipelines.evaluation.bench import MODELS, WORDS, Bench, stranger
from pipelines.evaluation.cells import cells
from pipelines.evaluation.found import Found
from pipelines.evaluation.held_out import HeldOut
from pipelines.evaluation.parts import Parts, chunks
from pipelines.evaluation.settings import CHAMPION, REAL, REFERENCES, UNIGRAM, EvaluateConfig
from pipelines.evaluation.subjects import Origin, Subject
from pipelines.kinds import KINDS

SUBJECTS = "subjects.json"  # written last: what a restart needs is there


def origins(config: EvaluateConfig, folder: Folder, uri: str) -> dict[str, Origin]:
    """Where every model comes from; with a gate, the present champion stands among them.

    Where this very evaluation has made its candidate the champion, the others are whom it beat.
    Raises ConfigError for a candidate that is not in the registry, DataError for what is missing.
    """
    found = {
        name: subjects.origin(name, address, uri=uri, root=config.root)
        for name, address in config.models.items()
    }
    if config.gate:
        candidate = found[config.gate.model]
        if "version" not in candidate:
            why = f"{candidate['address']} is not in the registry, so no alias can point at it"
            raise ConfigError(f"models.{config.gate.model}", why, "Name a models:/name@candidate")
        champion = registry.get_alias(candidate["name"], CHAMPION, uri)
        is_champion = champion and champion.uri == candidate["version"]
        if is_champion and promotion.decided(folder):
            earlier = {subject.name: subject.origin for subject in _before(folder)}
            return {**earlier, config.gate.model: candidate}
        if champion and not is_champion:
            found[CHAMPION] = subjects.origin(CHAMPION, champion.uri, uri=uri, root=config.root)
    return found


def rows(config: EvaluateConfig) -> HeldOut:
    """The rows to be asked about, behind them others for `real`, if the split has so many."""
    wanted = {"likelihood.rows": config.likelihood.rows, "samples.rows": config.samples.rows}
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
    config: EvaluateConfig, folder: Folder, origins: Mapping[str, Origin], rows: HeldOut, uri: str
) -> list[Subject]:
    """The models, once all are known to fit; their weights and the texts beside them are laid
    into the run directory, unless an earlier attempt has done so.

    Raises ConfigError where that attempt found other versions of the models.
    """
    if folder.exists(SUBJECTS):
        before = _before(folder)
        require_same({subject.name: subject.origin for subject in before}, origins, folder)
        return before
    for reader in config.readers:
        reader.check(uri)
    made = _lay(config, folder, origins, rows, uri)
    promotion.require(config, found(config, folder, made, rows))
    content = json.dumps([asdict(subject) for subject in made], indent=1)
    folder.write_bytes(SUBJECTS, content.encode())
    return made


def _before(folder: Folder) -> list[Subject]:
    """The models as an earlier attempt has laid them into the run directory."""
    fix = "Remove the file; the same command writes it anew"
    subjects: list[Subject] = documents.load(folder, SUBJECTS, list[Subject], fix)
    return subjects


def found(
    config: EvaluateConfig, folder: Folder, subjects: Sequence[Subject], rows: HeldOut
) -> Found:
    """Where the answers are going to be, and of which cells."""
    kinds = {subject.name: subject.kind for subject in subjects}
    length = rows.manifest.length
    walked = [
        cell
        for cell in cells(kinds, config.paths, length)
        if not KINDS[kinds[cell.model]].refusal(cell.walk, cell.budget, length)
    ]
    return Found(config, Parts(folder), tuple(walked), kinds)


def _lay(
    config: EvaluateConfig, folder: Folder, origins: Mapping[str, Origin], rows: HeldOut, uri: str
) -> list[Subject]:
    place, converter = folder / MODELS, config.converter
    made = []
    for name, origin in origins.items():
        made.append(subjects.freeze(name, origin, rows, place, converter=converter, uri=uri))
    for address in {address for reader in config.readers for address in reader.addresses()}:
        origin = {"address": address}
        subjects.freeze(stranger(address), origin, rows, place, converter=converter, uri=uri)
    place.write_bytes("tokenizer.json", rows.vocabulary.to_json().encode())
    _lay_texts(config, folder, rows)
    return made


def require_same(before: Mapping[str, Origin], now: Mapping[str, Origin], folder: Folder) -> None:
    """ConfigError unless an evaluation is of the very models that are meant now."""
    if before != now:
        raise ConfigError(
            "name",
            f"{folder.url} is an evaluation of other versions of these models",
            "Choose another name, or existing=restart to wipe it",
        )


def _lay_texts(config: EvaluateConfig, folder: Folder, rows: HeldOut) -> None:
    """What stands beside the models, as if it had been drawn: the references, more real text, and
    independent tokens; besides, the likelihood of the last and the words that there are."""
    bench = Bench(config)
    count, batch = config.samples.rows, config.batch
    asked = max(config.likelihood.rows, count)
    held_out_NL = rows.rows_NL
    # Where the split has too few rows for both, the references are the real text as well.
    real_NL = held_out_NL[asked:] if len(held_out_NL) == asked + count else held_out_NL[:count]
    sources = {
        REFERENCES: held_out_NL[:asked],
        REAL: real_NL,
        UNIGRAM: rows.unigram.draw(
            count * config.samples.repeats, rows.manifest.length, config.seed
        ),
    }
    for source, tokens_NL in sources.items():
        for first, size in chunks(len(tokens_NL), batch):
            table = jobs.texts(tokens_NL[first : first + size], first, bench)
            bench.parts.write(f"samples/{source}", first, table, {})
    nats_N = rows.unigram.nats(held_out_NL[: config.likelihood.rows])
    bench.parts.write(f"parts/likelihood/{UNIGRAM}/exact", 0, pa.table({"nats": nats_N}), {})
    bench.parts.write(WORDS, 0, pa.table({"word": sorted(rows.words)}), {})
