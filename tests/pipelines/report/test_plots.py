"""Plots show the rows they are given, stay legible, and bear whatever is missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.report import Row, plots, traces
from pipelines.report.drawing import Panels, style
from tests.pipelines.report import rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

pytestmark = pytest.mark.filterwarnings("error")
Draw = Callable[[list[Row]], bytes | None]

PLOTS: dict[str, tuple[Draw, list[Row]]] = {
    "losses": (lambda rows: plots.losses({"a": rows, "b": rows}), rows.journal()),
    "quality": (
        lambda rows: plots.quality(rows, "mauve", label="MAUVE", anchors={"real": math.nan}),
        rows.texts(),
    ),
    "splits": (lambda rows: plots.splits(rows, "mauve", label="MAUVE", show=".3f"), rows.texts()),
    "frontier": (
        lambda rows: plots.frontier(rows, "bits", across="nats", label="bits", goal="real"),
        rows.frontier(),
    ),
    "reliability": (plots.reliability, rows.calibration()),
    "nll": (plots.nll, rows.likelihood()),
    "errors_by_snr": (lambda rows: plots.by_snr(rows, plots.ERRORS), rows.states()),
    "by_state": (lambda rows: plots.by_state(rows, "nats", "nats"), rows.states()),
    "converter": (lambda rows: plots.by_snr(rows, plots.CONVERTER), rows.converter()),
    "courses": (lambda rows: plots.courses({"a": rows, "b": rows}), rows.course()),
    "schedule": (traces.schedule, rows.traces()),
    "remasking": (traces.remasking, rows.traces()),
    "sharpening": (traces.sharpening, rows.traces()),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were made."""
    figures: list[Figure] = []

    def keep(made: Panels) -> bytes:
        figures.append(made.figure)
        made.figure.draw_without_rendering()
        return b"drawn"

    monkeypatch.setattr(Panels, "png", keep)
    return figures


def lines(axes: Axes) -> dict[str, Any]:
    """The lines of a panel by name."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def points(axes: Axes, name: str) -> list[tuple[float, float]]:
    data = lines(axes)[name]
    line = data[0] if isinstance(data, tuple) else data  # of a curve with errors
    return list(zip(*map(list, line.get_data()), strict=True))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_png_and_leaves_nothing_behind(name: str) -> None:
    from matplotlib._pylab_helpers import Gcf

    draw, given = PLOTS[name]
    png = draw(given)
    assert png
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 5000
    assert draw(given) == png
    assert not Gcf.figs


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_to_show_is_no_plot(name: str) -> None:
    draw, given = PLOTS[name]
    labels = {
        "model",
        "path",
        "budget",
        "split",
        "temperature",
        "view",
        "step",
        "gamma",
        "gamma_star",
    }
    bare = [{key: value for key, value in row.items() if key in labels} for row in given]
    empty = [
        {k: [None] * len(v) if isinstance(v, list) and k != "split" else v for k, v in row.items()}
        for row in bare
    ]
    assert draw([]) is None
    assert draw(bare) is None
    assert draw(empty) is None


@pytest.mark.long
@pytest.mark.parametrize("name", PLOTS)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_missing_values_never_break_a_plot(
    name: str, data: st.DataObject, drawn: list[Figure]
) -> None:
    draw, given = PLOTS[name]
    keep = {"model", "path", "budget", "view", "split", "step", "gamma"}
    holes = st.sampled_from(["keep", "keep", "none", "nan", "drop"])

    def pierced(row: Row) -> Row:
        whole = dict(row)
        for key in sorted(row.keys() - keep):
            hole = data.draw(holes)
            if hole == "drop":
                del whole[key]
            elif hole != "keep":
                missing = None if hole == "none" else math.nan
                listed = isinstance(row[key], list)
                whole[key] = [missing, *row[key][1:]] if listed else missing
        return whole

    assert draw(list(map(pierced, given))) in (None, b"drawn")


# --- what is drawn is what is given --------------------------------------------------------------


def test_quality_draws_values_errors_and_anchors(drawn: list[Figure]) -> None:
    given = rows.texts(models=1, paths=1)
    plots.quality(given[::-1], "mauve", label="MAUVE", bounds=(0, 1), anchors=rows.ANCHORS)
    (axes,) = panels(drawn[0])
    walk = [row for row in given if row["path"] == "path 0"]
    assert points(axes, "model 0 path 0") == [(row["calls"], row["mauve"]) for row in walk]
    (bars,) = lines(axes)["model 0 path 0"][2]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((walk[0]["mauve"] - 0.02, walk[0]["mauve"] + 0.02))
    for name, value in rows.ANCHORS.items():
        assert set(lines(axes)[name].get_ydata()) == {value}
    assert axes.get_ylim() == (0, 1)


def test_a_hybrid_path_is_one_curve_for_each_number_of_continuous_calls(
    drawn: list[Figure],
) -> None:
    plots.quality(rows.texts(models=1, paths=0), "mauve", label="MAUVE")
    (axes,) = panels(drawn[0])
    assert set(lines(axes)) == {"model 0 hybrid 16 + …", "model 0 hybrid 32 + …"}
    assert [x for x, _ in points(axes, "model 0 hybrid 32 + …")] == [48, 64]


@pytest.mark.parametrize(("budgets", "scale"), [((16, 128), "linear"), ((16, 129), "log")])
def test_calls_are_logarithmic_from_a_span_of_eight(
    drawn: list[Figure], budgets: tuple[int, ...], scale: str
) -> None:
    walks = [row for row in rows.texts(budgets=budgets) if row["path"] != "hybrid"]
    plots.quality(walks, "mauve", label="MAUVE")
    assert {axes.get_xscale() for axes in panels(drawn[0])} == {scale}


def test_few_curves_share_a_panel_and_many_are_parted_by_model(drawn: list[Figure]) -> None:
    plots.quality(rows.texts(models=2, paths=2), "mauve", label="MAUVE")
    plots.quality(rows.texts(models=4, paths=6), "mauve", label="MAUVE")
    assert len(panels(drawn[0])) == 1
    assert [axes.get_title() for axes in panels(drawn[1])] == [f"model {m}" for m in range(4)]
    # A path looks the same in all panels.
    looks = [lines(axes)["path 3"][0] for axes in panels(drawn[1])]
    assert len({(line.get_color(), line.get_marker()) for line in looks}) == 1


def test_more_models_than_paths_are_compared_path_by_path(drawn: list[Figure]) -> None:
    plots.quality(rows.texts(models=6, paths=1), "mauve", label="MAUVE")
    path, hybrid = panels(drawn[0])
    assert (path.get_title(), hybrid.get_title()) == ("path 0", "hybrid")
    assert set(lines(path)) == {f"model {m}" for m in range(6)}
    assert len(lines(hybrid)) == 12


@pytest.mark.parametrize(("models", "paths"), [(1, 5), (3, 24)])
def test_the_legend_covers_nothing_and_names_every_curve_once(
    drawn: list[Figure], models: int, paths: int
) -> None:
    given = rows.texts(models=models, paths=paths)
    plots.quality(given, "mauve", label="MAUVE", anchors=rows.ANCHORS)
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(names) == len(set(names)) == paths + 2 + len(rows.ANCHORS)
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in panels(drawn[0]))
    assert drawn[0].bbox.y0 <= box.y0
    assert box.x1 <= drawn[0].bbox.x1


@pytest.mark.parametrize("length", [12, 24, 64])
@pytest.mark.parametrize(
    ("draw", "given"), [*PLOTS.values(), (PLOTS["quality"][0], rows.texts(models=1))]
)
def test_no_legend_leaves_its_figure(
    drawn: list[Figure], draw: Draw, given: list[Row], length: int
) -> None:
    names = ("model", "path")
    draw([row | {key: f"{row[key]:m<{length}}" for key in names if key in row} for row in given])
    (figure,) = drawn
    inside = [legend for axes in panels(figure) if (legend := axes.get_legend())]
    for legend in (*figure.legends, *inside):
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_styles_differ() -> None:
    seen = [tuple(style(index).values()) for index in range(56)]
    assert len(set(seen)) == 56
    # Colour and dashes alone tell as many apart as there are combinations.
    assert len({(style(index)["color"], style(index)["ls"]) for index in range(21)}) == 21


def test_splits_have_continuous_calls_down_and_endpoint_calls_across(drawn: list[Figure]) -> None:
    given = [row for row in rows.texts(models=1) if row.get("split") != [32, 16]]
    plots.splits(given, "mauve", label="MAUVE", show=".4f")
    (axes,) = panels(drawn[0])
    grid = axes.images[0].get_array()
    assert grid[0, 1] == pytest.approx(0.016 + 0.064)
    assert grid.mask.tolist() == [[False, False], [True, False]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32"]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "0.0480", (1, 0): "0.0800", (1, 1): "0.0960"}
    # Low values are dark, high ones light.
    inks = {text.get_text(): text.get_color() for text in axes.texts}
    assert inks == {"0.0480": "white", "0.0800": "black", "0.0960": "black"}
    dark, light = (axes.images[0].to_rgba(value)[:3] for value in (0.048, 0.096))
    assert sum(dark) < 1 < sum(light)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("endpoint calls", "continuous calls")


def test_a_frontier_has_a_panel_for_each_budget_with_the_star_to_hit(drawn: list[Figure]) -> None:
    plots.frontier(rows.frontier()[::-1], "bits", across="nats", label="bits", goal="real")
    first, second = panels(drawn[0])
    assert {first.get_title(), second.get_title()} == {"16 calls", "64 calls"}
    walks = {f"model {m} path {p}" for m in range(2) for p in range(2)}
    assert set(lines(first)) == set(lines(second)) == {*walks, "real", "near"}
    expected = [(2 * t, pytest.approx(2 + t + 0.25)) for t in (0.6, 0.8, 1.0)]
    assert points(first, "model 1 path 1") == expected
    assert points(first, "real") == [(1.7, 1.0)]
    assert points(second, "near") == [(1.5, 1.5), (1.7, 1.6)]
    low, high = first.get_ylim()
    assert low < 1 < high < 9
    box = drawn[0].legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in panels(drawn[0]))


def test_a_frontier_joins_neighbours_in_temperature_also_where_cooling_makes_texts_diverse(
    drawn: list[Figure],
) -> None:
    walk = {"model": "a", "path": "p", "budget": 8}
    heats = [(0.7, 3.0), (0.9, 4.0), (0.5, 3.5)]
    found = [walk | {"temperature": t, "diversity": d, "bits": t} for t, d in heats]
    plots.frontier(found, "bits", across="nats", label="bits", goal="real")
    (axes,) = panels(drawn[0])
    assert points(axes, "a p") == [(3.5, 0.5), (3.0, 0.7), (4.0, 0.9)]


def test_reliability_has_a_panel_for_each_snr_and_models_side_by_side(
    drawn: list[Figure],
) -> None:
    plots.reliability(rows.calibration(gammas=(100.0, 1.0)))
    low, high = panels(drawn[0])
    assert (low.get_title(), high.get_title()) == ("SNR 1", "SNR 100")
    assert set(lines(low)) == {"model 0: ECE 0.125", "model 1: ECE 0.125"}
    curve = points(low, "model 0: ECE 0.125")
    assert len(curve) == 9  # the empty bin is left out
    assert curve[0] == (0.15000000000000002, pytest.approx(0.15**2))
    # The area of a dot is 8, and 80 more for all of the predictions.
    areas = low.collections[0].get_sizes()
    assert areas.tolist() == pytest.approx([8 + 80 * count / 45 for count in range(1, 10)])


def test_an_empty_bin_is_no_dot_whatever_stands_in_it() -> None:
    (row,) = rows.calibration(models=1, gammas=(1.0,))
    filled = {"confidence": [0.5] * 10, "accuracy": [0.0] * 10}
    assert plots.reliability([{**row, **filled, "count": [0] * 10}]) is None


def test_nll_has_a_curve_and_a_line_for_each_model(drawn: list[Figure]) -> None:
    plots.nll(rows.likelihood())
    (axes,) = panels(drawn[0])
    curve = points(axes, "model 1 hybrid bound")
    assert curve == [(gamma, pytest.approx(4.4 + 2 / gamma)) for gamma in (10.0, 30.0, 100.0)]
    assert set(lines(axes)["model 1 endpoint bound"].get_ydata()) == {4.5}
    colours = [lines(axes)[f"model 1 {kind} bound"] for kind in ("hybrid", "endpoint")]
    assert colours[0][0].get_color() == colours[1].get_color()


def test_a_schedule_stacks_to_one(drawn: list[Figure]) -> None:
    traces.schedule(rows.traces(models=1, budgets=(8,)))
    (axes,) = panels(drawn[0])
    assert [area.get_label() for area in axes.collections] == ["masked", "evidence", "revealed"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert tops[-1] == pytest.approx(1)
    assert axes.get_xlim() == (1, 8)


def test_a_schedule_of_one_step_has_an_area(drawn: list[Figure]) -> None:
    traces.schedule(rows.traces(models=1, budgets=(1,)))
    (axes,) = panels(drawn[0])
    (_, _, revealed) = axes.collections
    corners = revealed.get_paths()[0].vertices
    assert (corners.max(0) - corners.min(0)).tolist() == [1.0, 1.0]


def test_rewrites_add_up_and_paths_that_take_nothing_back_are_left_out(
    drawn: list[Figure],
) -> None:
    remasked, masked = rows.traces(models=2, budgets=(8,))
    traces.remasking([remasked, {**masked, "remasked": [0.0] * 8}])
    _, right = panels(drawn[0])
    assert set(lines(right)) == {"model 0 remask 8"}
    assert points(right, "model 0 remask 8")[-1] == (1.0, 8 * 0.25)


def test_sharpening_ends_where_nothing_is_left(drawn: list[Figure]) -> None:
    traces.sharpening(rows.traces(models=1, budgets=(8,)))
    sure, nucleus, entropy = panels(drawn[0])
    curves = [points(axes, "model 0 remask 8") for axes in (sure, nucleus, entropy)]
    assert all([x for x, _ in curve] == [step / 8 for step in range(1, 8)] for curve in curves)
    assert [axes.get_yscale() for axes in (sure, nucleus, entropy)] == ["linear", "log", "linear"]


def test_of_very_many_traces_the_longest_of_each_path_are_drawn(drawn: list[Figure]) -> None:
    traces.schedule(rows.traces(models=9, budgets=(2, 4, 6)))
    titles = [axes.get_title() for axes in panels(drawn[0])]
    assert titles == [f"model {m} remask 6" for m in range(9)]


def test_the_converter_has_a_panel_for_each_of_its_figures(drawn: list[Figure]) -> None:
    """At positive SNR: there is no place for the other on a logarithmic axis."""
    plots.by_snr(rows.converter(), plots.CONVERTER)
    entropy, mask, token = panels(drawn[0])
    assert points(entropy, "model 1") == [(0.5, 2.0), (4.0, 0.6), (100.0, 3 / 101)]
    assert entropy.get_xscale() == "log"
    assert set(lines(mask)) == set(lines(token)) == {"model 0", "model 1"}


def test_each_kind_of_state_has_a_panel_and_a_model_is_in_those_that_it_was_asked_about(
    drawn: list[Figure],
) -> None:
    endpoints = [{"model": "mdlm", "revealed": share, "nats": 2 - share} for share in (0.0, 0.5)]
    plots.by_state([*endpoints, *rows.states(models=1)], "nats", "nats")
    shares, snr = panels(drawn[0])
    assert points(shares, "mdlm") == [(0.0, 2.0), (0.5, 1.5)]
    assert points(snr, "model 0") == [(gamma, 5 / (1 + gamma)) for gamma in (0.5, 4.0, 32.0)]
    assert [list(lines(axes)) for axes in (shares, snr)] == [["mdlm"], ["model 0"]]


def test_losses_of_many_runs_wrap(drawn: list[Figure]) -> None:
    plots.losses({f"run {n}": rows.journal() for n in range(5)} | {"empty": [{"step": 1}]})
    assert [axes.get_title() for axes in panels(drawn[0])] == [f"run {n}" for n in range(5)]
    heights = {round(axes.get_position().y0, 2) for axes in panels(drawn[0])}
    assert len(heights) == 2


def test_long_titles_do_not_run_into_each_other(drawn: list[Figure]) -> None:
    traces.schedule([{**row, "path": "hybrid of two long names"} for row in rows.traces(models=3)])
    boxes = [axes.title.get_window_extent() for axes in panels(drawn[0])]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_panels_do_not_overlap(drawn: list[Figure]) -> None:
    plots.reliability(rows.calibration(gammas=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0)))
    boxes = [axes.get_tightbbox() for axes in panels(drawn[0])]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_no_curve_leaves_its_panel(drawn: list[Figure]) -> None:
    """Panels below each other share an axis, and the first need not hold the largest value."""
    few = [
        {"model": model, "path": str(path), "budget": 4, "max_prob": [high / 2, high]}
        for model, high in (("low", 0.5), ("high", 0.9))
        for path in range(9)
    ]
    assert traces.sharpening(few)
    (figure,) = drawn
    for axes in figure.axes:
        for line in axes.get_lines():
            low, high = axes.get_ylim()
            assert all(low <= y <= high for y in line.get_ydata())
