import io

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from agents.benchmark import drawing as figures
from agents.benchmark.statistics import Band, Interval
from agents.look import HIGHLIGHT, INK, RIVALS

INTERVALS = {
    "uniform": Interval(0.7, 0.6, 0.8),
    "learned agent": Interval(0.9, 0.85, 0.95),
    "a schedule with a name of many words": Interval(0.8, 0.8, 0.8),
}
LEARNED = ["learned agent"]
AT = np.linspace(0, 1000, 11)
BANDS = {
    name: Band(AT, AT / 2000 + place / 10, AT / 2500, np.minimum(AT / 1500 + place / 10, 1))
    for place, name in enumerate(INTERVALS)
}
FAMILIES = ["digits", "signs"]
ALL = {
    "aggregates": lambda: figures.draw_aggregates(INTERVALS, LEARNED),
    "gaps": lambda: figures.draw_optimality_gaps(INTERVALS, LEARNED),
    "improvement": lambda: figures.draw_improvement(INTERVALS, "learned agent"),
    "profiles": lambda: figures.draw_profiles(BANDS, LEARNED),
    "efficiency": lambda: figures.draw_sample_efficiency(BANDS, LEARNED),
    "transfer": lambda: figures.draw_transfer(
        np.array([[0.9, np.nan], [0.25, 0.5]]), FAMILIES, FAMILIES
    ),
}


def tick_names(axis) -> list[str]:
    return [label.get_text().replace("\n", " ") for label in axis.get_ticklabels()]


def luminance(colour) -> float:
    parts = np.array(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other) -> float:
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
@pytest.mark.parametrize("colour", [HIGHLIGHT, INK, *RIVALS])
def test_palette_stands_out_from_light_and_dark_pages(colour, background):
    assert contrast(colour, background) >= 3.4


@pytest.mark.parametrize("name", ALL)
def test_figure_is_narrow_see_through_and_legible(name):
    figure = ALL[name]()
    assert figure.get_figwidth() <= 7
    assert figure.patch.get_alpha() == 0
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
    assert "<text" in svg.getvalue()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 8
    figure.canvas.draw()
    drawn = figure.get_tightbbox()  # inches
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= figure.get_figwidth()
    assert drawn.y1 <= figure.get_figheight()


def test_aggregates_are_sorted_and_learned_agents_stand_out():
    axes = figures.draw_aggregates(INTERVALS, LEARNED).axes[0]
    names = tick_names(axes.yaxis)
    assert names == ["uniform", "a schedule with a name of many words", "learned agent"]
    colours = {to_hex(line.get_color()) for line in axes.lines if 2 in line.get_ydata()}
    assert colours == {HIGHLIGHT}
    assert HIGHLIGHT not in {to_hex(line.get_color()) for line in axes.lines[:4]}
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [0.6, 0.8])
    assert [text.get_text() for text in axes.texts] == ["0.700", "0.800", "0.900"]


def test_smallest_gap_is_on_top():
    axes = figures.draw_optimality_gaps(INTERVALS, LEARNED).axes[0]
    assert tick_names(axes.yaxis)[-1] == "uniform"


def test_improvement_has_a_mark_at_one_half_and_names_the_agent():
    axes = figures.draw_improvement(INTERVALS, "ours").axes[0]
    assert any(set(line.get_xdata()) == {0.5} for line in axes.lines)
    assert "chance that ours does better" in axes.get_xlabel()
    assert axes.get_xlim()[0] < 0 < 1 < axes.get_xlim()[1]


@pytest.mark.parametrize("draw", [figures.draw_profiles, figures.draw_sample_efficiency])
def test_curves_have_bands_and_can_be_told_apart_without_colour(draw):
    figure = draw(BANDS, LEARNED)
    axes = figure.axes[0]
    assert len(axes.collections) == len(axes.lines) == 3
    assert len({line.get_marker() for line in axes.lines}) == 3
    learned = axes.lines[-1]
    assert to_hex(learned.get_color()) == HIGHLIGHT
    np.testing.assert_allclose(learned.get_ydata(), BANDS["learned agent"].value)
    legend = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted(BANDS)


@pytest.mark.parametrize("draw", [figures.draw_profiles, figures.draw_sample_efficiency])
def test_every_one_of_many_agents_has_a_panel_in_which_it_stands_out(draw):
    bands = {f"agent {number}": BANDS["uniform"] for number in range(3)}
    figure = draw({**bands, "cosine": BANDS["learned agent"]}, bands)
    *panels, left_over = figure.axes
    assert [axes.get_title() for axes in panels] == list(bands)
    assert not left_over.axison
    for axes in panels:
        colours = [to_hex(line.get_color()) for line in axes.lines]
        assert colours == [INK, INK, RIVALS[0], HIGHLIGHT]
        assert len(axes.collections) == 2  # bands of the rival and of the agent
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["the other agents", "cosine", "the agent of the panel"]


def test_profiles_show_where_curves_fall():
    at = np.linspace(0, 1, 101)
    value = np.clip((0.6 - at) / 0.2, 0, 0.9)  # one in ten diverged
    axes = figures.draw_profiles({"a": Band(at, value, value, value)}).axes[0]
    low, high = axes.get_xlim()
    assert 0.35 < low < 0.42
    assert 0.6 < high < 0.66


@pytest.mark.parametrize("metric", ["accuracy", "mean per-class recall"])
def test_axes_name_the_metric_and_have_room_for_it(metric):
    profiles = figures.draw_profiles(BANDS, LEARNED, metric)
    transfer = figures.draw_transfer(np.eye(2), FAMILIES, FAMILIES, metric)
    label = profiles._supylabel
    assert " ".join(label.get_text().split()) == f"share of runs with test {metric} above τ"
    assert transfer.get_supxlabel() == f"interquartile mean of test {metric}"
    for figure in (profiles, transfer):
        figure.canvas.draw()
    extent = label.get_window_extent()
    assert 0 <= extent.y0 < extent.y1 <= profiles.bbox.y1
    wide = transfer._supxlabel.get_window_extent()
    assert 0 <= wide.x0 < wide.x1 <= transfer.bbox.x1


def test_many_agents_have_styles_of_their_own():
    bands = {f"agent {number}": BANDS["uniform"] for number in range(12)}
    lines = figures.draw_profiles(bands).axes[0].lines
    styles = {(to_hex(x.get_color()), x.get_marker(), x._dash_pattern[1] and 1) for x in lines}
    assert len({(style[0], style[1]) for style in styles}) >= 10


def test_transfer_writes_every_number_in_ink_that_stands_out_from_its_cell():
    axes = ALL["transfer"]().axes[0]
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"0.90", "–", "0.25", "0.50"}
    assert tick_names(axes.yaxis) == tick_names(axes.xaxis) == FAMILIES
    image = axes.collections[0]
    for number in (0.9, 0.25, 0.5):
        cell = image.cmap(image.norm(number))
        assert contrast(texts[f"{number:.2f}"].get_color(), cell[:3]) >= 4


def test_transfer_to_many_families_fits():
    names = [f"family number {number}" for number in range(9)]
    figure = figures.draw_transfer(np.eye(9), names, names)
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels()
    extents = [label.get_window_extent() for label in labels]
    assert all(a.x1 <= b.x0 for a, b in zip(extents[:-1], extents[1:], strict=True))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.draw_aggregates({}),
        lambda: figures.draw_improvement({}, "ours"),
        lambda: figures.draw_profiles({}),
    ],
)
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw()


@pytest.mark.parametrize("shape", [(2, 3), (0, 0)])
def test_transfer_refuses_names_that_do_not_match(shape):
    with pytest.raises(ValueError, match="must have a row for each family trained on"):
        figures.draw_transfer(np.zeros(shape), FAMILIES[: shape[0]], FAMILIES[: shape[1]])
