"""The loader: layers, unions, messages, and the round trip through YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
import yaml
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from hypothesis import given
from hypothesis import strategies as st

from infra import config
from infra.errors import ConfigError, InfraError


@dataclass(frozen=True, kw_only=True)
class Masked:
    kind: Literal["masked"] = "masked"


@dataclass(frozen=True, kw_only=True)
class Remask:
    kind: Literal["remask"] = "remask"
    rule: Literal["cap", "rescale"] = "cap"
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta is {self.eta}, not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    kind: Literal["sentence"] = "sentence"
    gamma_max: float
    grid: Literal["linear", "log"] = "linear"


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    kind: Literal["hybrid"] = "hybrid"
    first: Sentence = Sentence(gamma_max=50.0)
    second: Path_
    split: tuple[int, int] = (16, 32)


Path_ = Masked | Remask | Sentence | Hybrid


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str
    steps: int = 100
    seed: int = 0
    amp: bool = False
    optimizer: Optimizer = Optimizer(lr=3e-4, betas=(0.9, 0.95))
    path: Path_ = Masked()
    judge: Path_ | None = None
    widths: tuple[int, ...] = ()
    stages: tuple[Remask, ...] = ()
    resources: dict[str, float] = field(default_factory=dict)
    samplers: dict[str, Path_] = field(default_factory=dict)
    folder: Path = Path("runs")


def load(*argv: str, presets: Path = Path("nowhere")) -> Config:
    verbs = ("prepare", "finetune")
    return config.load(Config, verb="finetune", argv=argv, presets=presets, verbs=verbs)


def preset(folder: Path, text: str, name: str = "small") -> Path:
    (folder / f"{name}.yaml").write_text(text)
    return folder


def test_defaults_then_preset_then_command_line(tmp_path: Path) -> None:
    preset(
        tmp_path,
        "finetune:\n  source: text\n  steps: 10\n  seed: 1\n  optimizer: {lr: 1e-3}\n"
        "prepare: {anything: goes}\n",
    )
    got = load("small", "seed=2", "optimizer.betas=[0.5, 0.6]", "seed=3", presets=tmp_path)
    assert got == Config(
        source="text", steps=10, seed=3, optimizer=Optimizer(lr=1e-3, betas=(0.5, 0.6))
    )


def test_a_partial_value_keeps_the_rest_of_the_default_instance() -> None:
    assert load("source=s", "optimizer.lr=1").optimizer == Optimizer(lr=1.0, betas=(0.9, 0.95))


def test_presets_come_by_name_path_and_url(tmp_path: Path) -> None:
    file = preset(tmp_path, "finetune: {source: here}") / "small.yaml"
    for argument in ("small", str(file), f"file://{file}"):
        assert load(argument, presets=tmp_path).source == "here"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["path=remask"], Remask()),
        (["path={kind: remask, eta: 0.1}"], Remask(eta=0.1)),
        (["path=remask", "path.eta=1e-1"], Remask(eta=0.1)),
        # a new kind forgets what was said of the old one; later wins
        (["path=remask", "path.eta=0.1", "path.kind=sentence", "path.gamma_max=3"],
         Sentence(gamma_max=3.0)),
        (["path=remask", "path.eta=0.1", "path.kind=remask"], Remask(eta=0.1)),
        (["path=remask", "path.eta=0.1", "path=masked", "path=remask"], Remask()),
        # nested unions, and defaults within the chosen member
        (["path=hybrid", "path.first.grid=log", "path.second=remask", "path.split=[0, 4]"],
         Hybrid(first=Sentence(gamma_max=50.0, grid="log"), second=Remask(), split=(0, 4))),
    ],
)  # fmt: skip
def test_unions(argv: list[str], expected: object) -> None:
    assert load("source=s", *argv).path == expected


@dataclass(frozen=True, kw_only=True)
class Fed:
    food: str | Optimizer
    other: int = 0


def test_text_or_a_mapping_in_its_place(tmp_path: Path) -> None:
    def fed(*argv: str) -> object:
        preset(tmp_path, "finetune: {food: bread}")
        return config.load(Fed, verb="finetune", argv=["small", *argv], presets=tmp_path).food

    mapping = "food={lr: 2.0, betas: [0.5, 0.5]}"
    assert fed() == "bread"
    assert fed(mapping, "food.lr=3") == Optimizer(lr=3.0, betas=(0.5, 0.5))
    assert fed(mapping, "food=water") == "water"
    with pytest.raises(ConfigError, match=r"^food: required, a {lr, betas} \| str"):
        config.load(Fed, verb="finetune", argv=["other=1"], presets=tmp_path)
    with pytest.raises(ConfigError, match="food"):
        fed("food=3")
    shown = {field.key: field for field in config.describe(Fed)}
    assert shown["food"].default == "required"
    assert "food.lr" in shown


def test_optional_unions_and_null() -> None:
    assert load("source=s", "judge=remask", "judge.eta=0.5").judge == Remask(eta=0.5)
    assert load("source=s", "judge={kind: remask, eta: 0.5}", "judge=null").judge is None
    assert load("source=s", "judge=remask", "judge=", "judge=masked").judge == Masked()


def test_containers() -> None:
    got = load(
        "source=s", "widths=[1, 2]", "stages=[{eta: 1e-1}, {rule: rescale}]",
        "resources={CPU: 1}", "resources.GPU=2", "samplers={a: masked}", "samplers.b=remask",
        "folder=out",
    )  # fmt: skip
    assert got.widths == (1, 2)
    assert got.stages == (Remask(eta=0.1), Remask(rule="rescale"))
    assert got.resources == {"CPU": 1.0, "GPU": 2.0}
    assert got.samplers == {"a": Masked(), "b": Remask()}
    assert got.folder == Path("out")


def test_a_key_of_a_mapping_may_hold_dashes_and_spaces() -> None:
    got = load("source=s", "resources={web-text: 1}", "resources.web-text=2", "resources.a b=3")
    assert got.resources == {"web-text": 2.0, "a b": 3.0}


def test_a_number_with_a_leading_zero_is_decimal() -> None:
    assert load("source=s", "seed=010", "steps=08", "optimizer.lr=010").seed == 10
    assert load("source=s", "steps=0x10", "resources={CPU: 1.5, GPU: .inf}").steps == 16


@pytest.mark.parametrize(
    "text", ["a: b", "foo # bar", "@x", "2024-01-01", "s3://bucket/key=1/x", "- item", "a=b"]
)
def test_text_stays_as_typed(text: str) -> None:
    assert load(f"source={text}").source == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stesp=3"], "stesp (command line): no such key. Did you mean `steps`?"),
        (["optimizer.lrr=3"], "optimizer.lrr (command line): no such key. Did you mean `lr`?"),
        (["path=remask", "path.etaa=3"], "path.etaa (command line): no such key"),
        (["path=maskd"], "path.kind (command line): no kind 'maskd'. Did you mean `masked`?"),
        (["judge={eta: 1}"], "judge.kind (command line): missing. Known: masked, remask"),
        (["path=remask", "path.rule=capp"],
         "path.rule (command line): expected 'cap' | 'rescale', got 'capp'. Did you mean `cap`?"),
        (["steps=many"], "steps (command line): expected int, got 'many'"),
        (["steps=1:30"], "steps (command line): expected int, got '1:30'"),
        (["resources={yes: 1, true: 2}"], "not YAML: 'True' is there twice"),
        (["resources={1: 1, 1.0: 2}"], "not YAML: '1.0' is there twice"),
        (["steps=yes"], "steps (command line): expected int, got True"),
        (["path=remask", "path.eta=yes"], "path.eta (command line): expected float, got True"),
        (["steps={a: 1}"], "steps (command line): expected int, got {'a': 1}"),
        (["source=12"], "source (command line): expected str, got 12. Quote it"),
        (["optimizer=3"], "optimizer (command line): expected a mapping, got 3"),
        (["path=remask", "path.eta=-1"], "path: eta is -1.0, not in [0, 1]"),
        (["path=sentence"], "path.gamma_max: required, a float"),
        (["path=hybrid"], "path.second: required, a masked | remask | sentence | hybrid"),
        (["optimizer.betas=[1]"], "optimizer.betas (command line): expected [float, float]"),
        (["samplers=1"], "expected {str: masked | remask | sentence | hybrid, …}, got 1"),
        (["widths=1"], "widths (command line): expected [int, …], got 1"),
        (["widths=[1, x]"], "widths.1 (command line): expected int, got 'x'"),
        (["resources.CPU=x"], "resources.CPU (command line): expected float, got 'x'"),
        (["widths=[1"], "widths=[1: not YAML"),
        (["one", "two"], "command line: one preset at most, got one and two"),
    ],
)  # fmt: skip
def test_one_message(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("source=s", *argv)
    assert message in str(caught.value)


def test_a_missing_field_is_named_with_its_type() -> None:
    with pytest.raises(ConfigError, match="source: required, a str"):
        load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune: {source: s, stepz: 1}", r"stepz \(small\): no such key. Did you mean `steps`"),
        ("finetuen: {}", "small: finetuen: no such verb. Did you mean `finetune`?"),
        ("prepare: {}", "small: no section `finetune`. It has prepare"),
        ("- 1", "small: not a mapping of verbs"),
        ("", "small: not a mapping of verbs"),
        ("a: [", "small: not YAML"),
        ("finetune: 3", r"configuration \(small\): expected a mapping, got 3"),
    ],
)
def test_bad_presets(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("small", presets=preset(tmp_path, text))


def test_a_mistyped_preset_is_offered_the_nearest(tmp_path: Path) -> None:
    preset(tmp_path, "finetune: {}", "quickstart")
    with pytest.raises(ConfigError, match=r"no such preset\. Did you mean `quickstart`"):
        load("quikstart", presets=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load("nosuchscheme://x.yaml")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (NoCredentialsError(), "no usable credentials"),
        (EndpointConnectionError(endpoint_url="x"), "the store does not answer"),
    ],
)
def test_a_preset_in_a_store_that_refuses(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str
) -> None:
    """Neither is an OSError."""

    def refuse(*given: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(fsspec, "open", refuse)
    with pytest.raises(InfraError, match=f"^s3://bucket/x.yaml: {why}"):
        load("s3://bucket/x.yaml")


def test_all_defaults_need_no_section(tmp_path: Path) -> None:
    got = load("small", "source=s", presets=preset(tmp_path, "finetune:"))
    assert got == Config(source="s")


paths: Any = st.recursive(
    st.builds(Masked)
    | st.builds(Remask, eta=st.none() | st.floats(0, 1))
    | st.builds(Sentence, gamma_max=st.floats(allow_nan=False)),
    lambda inner: st.builds(Hybrid, second=inner),
    max_leaves=3,
)
configs = st.builds(
    Config,
    source=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    steps=st.integers(-(1 << 63), (1 << 63) - 1),
    optimizer=st.builds(Optimizer, lr=st.floats(allow_nan=False)),
    path=paths,
    judge=st.none() | paths,
    widths=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=3).map(tuple),
    stages=st.lists(st.builds(Remask), max_size=2).map(tuple),
    resources=st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False), max_size=2),
    samplers=st.dictionaries(st.sampled_from("abc"), paths, max_size=2),
)


@given(configs)
def test_yaml_round_trip(value: Config) -> None:
    section = yaml.safe_load(config.to_yaml(value, "finetune"))["finetune"]
    again = config._build(Config, [config.Layer("yaml", section)], "")
    assert again == value
    assert config.digest(again) == config.digest(value)


def test_flatten_and_digest() -> None:
    value = Config(source="s", path=Remask(eta=0.1), widths=(1, 2), samplers={"a": Masked()})
    flat = config.flatten(value)
    assert flat["optimizer.lr"] == 3e-4
    assert flat["path.kind"] == "remask"
    assert flat["widths"] == "[1, 2]"
    assert flat["samplers.a.kind"] == "masked"
    assert flat["judge"] is None
    assert flat["resources"] == "{}"
    assert flat["folder"] == "runs"
    assert config.digest(value) == config.digest(dataclasses.replace(value))
    assert config.digest(value) != config.digest(dataclasses.replace(value, steps=101))


def test_describe_lists_every_field_once() -> None:
    rows = [tuple(row) for row in config.describe(Config)]
    assert ("source", "str", "required") in rows
    assert ("optimizer.lr", "float", "0.0003") in rows
    assert ("path", "masked | remask | sentence | hybrid", "masked") in rows
    assert ("path.eta", "float | null (remask)", "null") in rows
    assert ("path.first.gamma_max", "float (sentence)", "50.0") in rows
    assert len(rows) == len(set(rows))


@dataclass(frozen=True, kw_only=True)
class Sectioned:
    adapter: Optimizer | None = None


def test_a_section_that_is_off_by_default_is_described_as_off() -> None:
    rows = [tuple(row) for row in config.describe(Sectioned)]
    assert rows[:2] == [
        ("adapter", "{lr, betas} | null", "null"),
        ("adapter.lr", "float", "required"),
    ]


@dataclass(frozen=True, kw_only=True)
class Counted:
    rows: int = 1
    budget: int | None = None

    def __post_init__(self) -> None:
        config.at_least(1, self, "rows", "budget")


def test_a_count_that_is_too_small_is_told_by_its_name() -> None:
    assert Counted() == Counted(rows=1, budget=None)
    for name in ("rows", "budget"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0$"):
            Counted(**{name: 0})
