"""Do the figures show what they say? Each on small random arrays, and all of them from a tiny run."""

import json
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import grad_nb.study.figures as figures
from grad_nb.core.files import read_json, write_json
from grad_nb.datasets.readers import resize_pictures
from grad_nb.evaluation import pixel_map
from grad_nb.explain import make_bank, patch_features
from grad_nb.patches import PATCH, STRIDE
from grad_nb.plots import (
    FeatureCloud,
    Localised,
    field_figure,
    heat_overlay,
    localisation_figure,
    map_overlays,
    patches_figure,
    picture_table,
    speed_figure,
    weight_figure,
    weight_overlay,
)
from grad_nb.reweighting import noisy_weight, tail_weight
from grad_nb.runs.driver import package_file, template_parameters
from grad_nb.runs.notebooks import DATA_NOTE
from grad_nb.runs.stages import detect_stage, evaluate_stage, generate_stage, load_normals, open_run
from grad_nb.study.figures import (
    Missing,
    draw_figure,
    field_supports,
    finished_runs,
    localised,
    measured_peers,
    measured_points,
    spread_over_types,
    weight_maps,
)
from grad_nb.study.lamps import lamps_of_runs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def pictures(n, side=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def shown(figure):
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]


def words(figure):
    "All texts of a figure; labels of ticks are there once it was drawn."
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(plt.Text) if t.get_text() and t.get_visible()]


def overlapping(figure):
    "Pairs of texts that cover each other when the figure is drawn."
    figure.canvas.draw()
    texts = [
        t
        for t in figure.findobj(plt.Text)
        if t.get_text().strip() and t.get_visible() and all(ax.get_visible() for ax in [t.axes] if ax)
    ]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    boxes = [(text, b) for text, b in boxes if b.width > 1 and b.height > 1]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.padded(-1).overlaps(y.padded(-1))]


# ---- one function for each figure ------------------------------------------------------------------------------------


def test_speed_figure_draws_what_is_known_and_nothing_else():
    points = pd.DataFrame(
        {
            "method": ["A", "B", "C", "D"],
            "latency_ms": [0.8, 20, 60, 4],
            "auroc": [87.5, 70, 75, np.nan],
            "parameters": [8e6, 2e6, np.nan, 1e6],
            "ours": [False, True, False, True],
        }
    )
    figure = speed_figure(points, "somewhere", area=10)
    ax = figure.axes[0]
    marks = [c for c in ax.collections if len(c.get_offsets())]
    assert [tuple(c.get_offsets()[0]) for c in marks] == [(0.8, 87.5), (20, 70), (60, 75)]
    assert [c.get_sizes()[0] for c in marks[:2]] == [80, 20]  # four times the parameters, four times the area
    assert len(marks[2].get_facecolor()) == 0 and len(ax.lines) == 1 and set(ax.lines[0].get_xdata()) == {4}
    assert ax.get_xscale() == "log" and {"A", "B", "C", "D: accuracy not measured", "somewhere"} <= set(words(figure))
    with pytest.raises(ValueError, match="no method"):
        speed_figure(points[:0])


@pytest.mark.parametrize("auroc", [np.nan, 62.0])
def test_two_precisions_of_ours_do_not_hide_each_other(auroc):
    points = pd.DataFrame(
        {
            "method": ["GCAD", "GRAD here, bf16", "GRAD here, float32"],
            "latency_ms": [12.9, 58, 64],
            "auroc": [83.3, auroc, auroc],
            "parameters": [np.nan, 8.7e6, 8.7e6],
            "ours": [False, True, True],
        }
    )
    assert not overlapping(speed_figure(points))


def test_picture_table_puts_every_picture_in_its_place():
    a, b, c = pictures(3), pictures(2, seed=1), pictures(3, seed=2)
    figure = picture_table(
        {"one": {"real": a, "level 5": b}, "two_words": {"real": c}}, {"real": 2, "level 5": 3}, title="all"
    )
    assert len(figure.axes) == 10
    got = shown(figure)
    assert len(got) == 6 and all((x == y).all() for x, y in zip(got, [a[0], a[1], b[0], b[1], c[0], c[1]]))
    assert {"real", "level 5", "one", "two\nwords", "all"} <= set(words(figure)) and not overlapping(figure)


def test_field_figure_marks_the_support_and_dims_the_rest():
    support = np.zeros((30, 30), bool)
    support[10:15, 7:12] = True
    wide = np.zeros((30, 30), bool)
    wide[4:21, 1:18] = True
    picture = pictures(1, 30)[0]
    figure = field_figure(picture, picture[::-1], {5: support, 17: wide}, (12, 9), {5: pictures(1, 30, 1)[0]})
    whole, five, seventeen, noised, made, empty = figure.axes
    assert [(p.get_xy(), p.get_width(), p.get_height()) for p in whole.patches] == [
        ((6.5, 9.5), 5, 5),
        ((0.5, 3.5), 17, 17),
    ]
    window, (x, y) = np.asarray(five.images[0].get_array()), five.patches[0].get_xy()
    y, x = int(y + 0.5), int(x + 0.5)
    assert (window[y - 2 : y + 3, x - 2 : x + 3] == picture[10:15, 7:12]).all() and window[
        y, x + 4
    ].min() >= 191  # pale outside
    assert "17 × 17" in seventeen.get_title() and made.images and not empty.images and not overlapping(figure)


def test_patches_figure_shows_patches_coordinates_and_weights():
    rng = np.random.default_rng(0)
    groups = {name: rng.uniform(-1, 1, (4, 5, 34, 34)) for name in ("normal", "wrong", "made")}
    weight = np.r_[np.full(20, np.nan), np.full(10, 2.0), np.full(10, 0.5)]
    cloud = FeatureCloud(
        rng.normal(size=(40, 2)), (0.7, 0.1), ["normal"] * 20 + ["wrong"] * 10 + ["made"] * 10, weight, 1 / weight
    )
    figure = patches_figure(groups, cloud, columns=3)
    got = shown(figure)
    assert len(got) == 18 and (got[0] == np.round((groups["normal"][0, :3] + 1) * 127.5).transpose(1, 2, 0)).all()
    scatters = [ax for ax in figure.findobj(plt.Axes) if len(ax.collections) == 3 and not ax.images]
    assert len(scatters) == 2
    for ax, red in zip(scatters, (1, 2)):
        colours = [c.get_facecolor()[0] for c in ax.collections]
        assert [len(c.get_offsets()) for c in ax.collections] == [20, 10, 10]
        assert (
            colours[red][0] > colours[red][2] and colours[3 - red][2] > colours[3 - red][0]
        )  # heavy is red, light is blue
    assert {"× 2", "× 0.5", "× 1", "normal", "wrong", "made"} <= set(words(figure)) and any(
        "70%" in w for w in words(figure)
    )
    assert not overlapping(figure)


def test_weight_figure_is_red_where_a_weight_is_large():
    real, made = pictures(2), pictures(2, seed=1)
    log2 = np.zeros((2, 12, 12))
    log2[:, :, 6:] = 1
    log2[:, :, :6] = -1
    figure = weight_figure(real, made, log2, -log2, ["a_b\nlevel 5", "c"])
    got = shown(figure)
    assert len(got) == 8 and (got[0] == real[0]).all() and (got[3] == made[1]).all()
    filtering, rebalancing = got[4].astype(int), got[6].astype(int)
    assert (filtering[:, 6:, 0] > filtering[:, 6:, 2]).all() and (filtering[:, :6, 2] > filtering[:, :6, 0]).all()
    assert (
        (rebalancing[:, 6:, 2] > rebalancing[:, 6:, 0]).all()
        and words(figure).count("× 2") == 2
        and not overlapping(figure)
    )


def test_weight_overlay_saturates_and_is_neutral_at_zero():
    grey = np.full((1, 3, 3), 100, np.uint8)
    assert (
        weight_overlay(grey, np.array([[-1.0, 0, 1]]), 1.0) == weight_overlay(grey, np.array([[-7.0, 0, 9]]), 1.0)
    ).all()
    assert np.ptp(weight_overlay(grey, np.zeros((1, 3)), 1.0).astype(int)) < 5


def test_localisation_figure_outlines_the_defects_and_leaves_normal_grey():
    x, masks, maps = pictures(3, 40), np.zeros((3, 40, 40), bool), np.zeros((3, 40, 40))
    masks[1, 10:20, 10:20] = True
    maps[1, 10:20, 10:20] = 5
    model = Localised(x, maps, (1.0, 4.0), masks, ["good", "bad", "good"])
    figure = localisation_figure({"one": model, "two_words": replace(model, masks=None)}, title="where")
    panels = [ax for ax in figure.axes if ax.images][:-1]
    assert len(panels) == 12 and sum(bool(ax.collections) for ax in panels) == 1 and panels[3].collections
    below = np.asarray(panels[1].images[0].get_array()).astype(int)
    assert (below == x[0].mean(-1, keepdims=True).round()).all()  # below the first limit there is no colour
    assert (np.asarray(panels[3].images[0].get_array()) == heat_overlay(x[1], maps[1], (1.0, 4.0))).all()
    assert {"one", "two\nwords", "where", "bad"} <= set(words(figure)) and any(
        "normal pixels" in w for w in words(figure)
    )
    assert not overlapping(figure)
    alone = map_overlays(x, maps, (1.0, 4.0), masks, ["good", "bad", "good"])
    assert len(alone.axes) == 6 and not any("normal pixels" in w for w in words(alone))


# ---- from a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(data, tmp_path_factory):
    "Two seeds of a tiny run, as the batch leaves them; the notebook's record of where the pictures were is made up."
    runs = tmp_path_factory.mktemp("runs")
    for seed in (1, 0):
        run = open_run(data, "trays", "demo", seed, runs, TINY, "cpu", progress=False)
        for n in run.generator_levels:
            generate_stage(run, n)
        for row in run.levels:
            detect_stage(run, row.level)
        evaluate_stage(run)
        write_json(
            run.folder / "notebooks/table.ipynb", {"metadata": {"papermill": {"parameters": {"data": str(data)}}}}
        )
    return runs / "demo"


@pytest.fixture(scope="module")
def run(batch):
    return finished_runs(batch)[0][0]


def test_one_run_of_each_category_that_of_the_lowest_seed(batch, data, tmp_path):
    found, notes = finished_runs(batch)
    assert [(r.category.name, r.seed) for r in found] == [("trays", 0)] and not notes
    moved = shutil.copytree(data, tmp_path / "moved")
    assert finished_runs(batch, data=moved)[0][0].category.root == moved / "trays"
    (moved / "trays/train/good/000.png").write_bytes((moved / "trays/train/good/001.png").read_bytes())
    found, notes = finished_runs(batch, data=moved)
    assert not found and "not what" in notes[0]
    assert finished_runs(batch, data=tmp_path)[1][0].startswith("trays/trays is left out")


def test_other_lamps_are_held_to_what_the_run_reached(batch, data, tmp_path):
    table = lamps_of_runs(batch)
    assert table.index.names == ["category", "lamp"] and {*table.index.levels[0]} == {"trays"}
    result = read_json(batch / "trays/trays/seed0/result.json")
    assert table.loc[("trays", "own"), "image AUROC"] == pytest.approx(100 * result["image_auroc"])
    assert (table.loc[("trays", "own")].iloc[2:] == 0).all()
    with pytest.raises(ValueError, match="no finished run whose pictures"):
        lamps_of_runs(batch, data=tmp_path)


def test_the_pictures_are_where_the_notebooks_were_given_them(tmp_path):
    "An executed notebook does not say so; the note beside it does, and those of older versions themselves."
    assert figures.recorded_data(tmp_path) == ""
    given = {"metadata": {"papermill": {"parameters": {"data": "…/data"}}}}
    write_json(tmp_path / "notebooks/table.ipynb", given)
    assert figures.recorded_data(tmp_path) == "…/data"
    write_json(tmp_path / "notebooks" / DATA_NOTE, {"data": "/where/they/are"})
    assert figures.recorded_data(tmp_path) == "/where/they/are"


def test_a_run_of_another_version_is_named_and_not_drawn(batch, data, tmp_path):
    run = tmp_path / "seed0"
    run.mkdir()
    result = json.loads((batch / "trays/trays/seed0/result.json").read_text())
    result["config"]["generator"]["colour_of_tomorrow"] = 3
    write_json(run / "result.json", result)
    found, notes = finished_runs(tmp_path, data=data)
    assert not found and "another version" in notes[0] and "colour_of_tomorrow" in notes[0]


def test_runs_of_an_ablation_are_named_and_not_drawn(batch, tmp_path):
    run = tmp_path / "seed0"
    run.mkdir()
    result = json.loads((batch / "trays/trays/seed0/result.json").read_text())
    write_json(tmp_path / "own/result.json", result | {"seed": 1})
    result["config"]["detector"]["tail_reweighting"] = False
    write_json(run / "result.json", result)
    _, notes = finished_runs(tmp_path)
    assert str(run) in notes[0] and notes[0].startswith("1 runs without all parts")


def test_weights_of_the_figure_are_those_of_the_equations(run):
    detector, size, made = figures.trained_detector(run), run.levels[0].size, figures.contrastive(run, 5)[:1]
    banks = [
        make_bank({0: s}, detector, size, 40, torch.Generator().manual_seed(1)).features
        for s in (load_normals(run), figures.contrastive(run, 3))
    ]
    side = (size - PATCH) // STRIDE + 1
    cells = np.array([(r, c) for r in range(side) for c in range(side)])
    small = resize_pictures(made, size)[0]
    z = torch.from_numpy(
        patch_features(
            detector, np.stack([small[4 * r : 4 * r + 34, 4 * c : 4 * c + 34] for r, c in cells]), cells, size
        )
    )
    for got, weight, bank in zip(
        weight_maps(detector, made, tuple(banks), size, 1.5), (noisy_weight, tail_weight), banks
    ):
        want = pixel_map(
            torch.log2(weight(z, torch.from_numpy(bank), 1.5)).view(1, side, side), 64, size, blur=False
        ).numpy()
        assert np.ptp(got - want) < 1e-4  # up to the constant that puts the typical patch at zero


def test_a_typical_generated_patch_has_weight_one(run):
    detector, size = figures.trained_detector(run), run.levels[0].size
    banks = tuple(
        make_bank({0: s}, detector, size, 200, torch.Generator().manual_seed(1)).features
        for s in (load_normals(run), figures.contrastive(run, 3))
    )
    for maps in weight_maps(detector, figures.contrastive(run, 3), banks, size, 1.0):
        assert abs(maps.mean()) < 0.3 * maps.std() + 1e-3


def test_the_field_is_cut_at_the_border(run):
    for level, support in field_supports(run, (1, 62)).items():
        rows, columns = np.nonzero(support)
        field = 2 * level - 1 if run.preset.generator.field_of == "bottleneck" else level
        assert (
            rows.min() == max(0, 1 - field // 2)
            and columns.max() == min(63, 62 + field // 2)
            and support.sum() < field**2
        )


@given(
    st.lists(st.tuples(st.sampled_from(["good", "a", "b"]), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(3, 9),
)
@settings(deadline=None)
def test_pictures_are_spread_over_types_and_scores(rows, n):
    table = pd.DataFrame(rows, columns=["type", "score"])
    chosen = spread_over_types(table, n)
    assert len(chosen) == len(set(chosen)) <= n
    for kind, group in table[table.type != "good"].groupby("type"):
        mine = table.score[[i for i in chosen if table.type[i] == kind]]
        assert len(mine) and mine.min() == group.score.min()
        if len(mine) > 1:
            assert mine.max() == group.score.max()
    good = table.score[table.type == "good"]
    if len(good):
        assert table.type[chosen[-1]] == "good" and table.score[chosen[-1]] == good.max()


def test_localised_pictures_belong_to_their_maps(run):
    found = localised(run, 6, side=64)
    scores, maps = pd.read_csv(run.folder / "scores.csv"), np.load(run.folder / "maps.npy")
    for i, title in enumerate(found.titles):
        k = next(k for k in range(len(maps)) if (maps[k] == found.maps[i].astype(np.float16)).all())
        assert title.split("\n")[0] == scores.type[k].removesuffix("_anomalies") and bool(scores.label[k]) == bool(
            found.masks[i].any()
        )


def test_speed_is_joined_to_accuracy_only_for_the_same_detectors(batch, tmp_path, monkeypatch):
    row = {"detectors": "256 + 128 + 64", "precision": "float32", "batch": 1, "median_ms": 3.0, "device": "x"}
    write_json(tmp_path / "bench.json", {"detectors": [row, row | {"detectors": "64"}, row | {"batch": 8}]})
    points = measured_points(batch, tmp_path / "bench.json")
    assert len(points) == 1 and np.isnan(points.auroc[0]) and points.parameters[0] == 3 * 2_923_457
    monkeypatch.setattr(figures, "values", lambda *_: pd.Series([80.0, 82.0]))
    monkeypatch.setattr(figures, "_same_detectors", lambda *_: True)
    assert measured_points(batch, tmp_path / "bench.json").auroc[0] == 81
    with pytest.raises(Missing, match="grad_bench"):
        measured_points(batch, "")
    for other in ({}, [], {"detectors": [row | {"batch": 8}]}):
        write_json(tmp_path / "other.json", other)
        with pytest.raises(Missing, match="no detectors"):
            measured_points(batch, tmp_path / "other.json")


def test_the_speed_of_the_runs_own_detectors_is_taken_where_it_was_measured(batch, tmp_path, monkeypatch):
    row = {"detectors": "256 + 128 + 64", "precision": "bf16", "batch": 1, "median_ms": 3.0, "device": "x"}
    own = row | {"detectors": "96", "width": 0.25, "median_ms": 2.0, "transfers": "inside", "timed": "whole pictures"}
    rows = [row, own, own | {"transfers": "outside", "median_ms": 1.0}]
    write_json(tmp_path / "bench.json", {"detectors": [own | {"timed": "its size"}], "protocol": rows})
    monkeypatch.setattr(figures, "values", lambda *_: pd.Series([90.0]))
    monkeypatch.setattr(figures, "_same_detectors", lambda found, sizes, width: (sizes, width) == ([96], 0.25))
    points = measured_points(batch, tmp_path / "bench.json")
    assert points.latency_ms.tolist() == [2.0] and points.auroc[0] == 90 and points.parameters[0] < 300_000


def test_peers_that_were_run_here_join_with_their_published_accuracy(tmp_path):
    row = {"batch": 1, "median_ms": 600.0, "device": "x"}
    write_json(
        tmp_path / "bench.json",
        {
            "peers": [
                {"method": "GRAD here"} | row,
                {"method": "PatchCore (anomalib)"} | row,
                {"method": "STFPM (anomalib)"} | row,
                {"method": "PaDiM (anomalib)", "error": "no such layer"},
                {"method": "PaDiM (anomalib)"} | row | {"batch": 16},
            ]
        },
    )
    points = measured_peers(tmp_path / "bench.json")
    assert (
        points.method.tolist() == ["PatchCore, run here"]
        and points.auroc[0] == 79.3
        and points.latency_ms[0] == 600
        and not points.ours[0]
    )
    assert speed_figure(pd.concat([figures.published_points(), points]))
    for none in ({}, []):
        write_json(tmp_path / "bench.json", none)
        assert measured_peers(tmp_path / "bench.json").empty


def test_a_figure_left_out_leaves_no_older_file(tmp_path, capsys):
    assert draw_figure(3, tmp_path, lambda: speed_figure(figures.published_points()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure-3.pdf", "figure-3.png"]

    def without():
        raise Missing("nothing to draw")

    assert draw_figure(3, tmp_path, without) is None and not list(tmp_path.iterdir())
    assert "Figure 3 is left out: nothing to draw" in capsys.readouterr().out


def test_the_template_draws_what_there_is_and_says_what_there_is_not(batch, tmp_path, capsys):
    "The cells of the template, in this process."
    values, space = {"runs": str(batch), "folder": str(tmp_path)}, {}
    assert set(values) <= set(template_parameters(package_file("figures.ipynb")))
    for cell in json.loads(package_file("figures.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(values)
    said = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"figure-{n}.{e}" for n in range(1, 7) for e in ("png", "pdf")
    )
    for n in (7, 8):
        assert f"Figure {n} is left out: no finished run" in said
    assert "ours is left out" in said and all(p.stat().st_size > 5000 for p in tmp_path.iterdir())


def test_no_text_of_a_figure_lies_on_another(run):
    for figure in (
        speed_figure(figures.published_points(), "published"),
        field_figure(**figures.field_arrays(run)),
        patches_figure(*figures.patch_arrays(run, 8)),
        weight_figure(**figures.weight_arrays([run, run])),
        localisation_figure({"trays": localised(run), "juice_bottle": localised(run)}),
        picture_table({"trays": figures.by_level(run, 2)}),
    ):
        assert not overlapping(figure)


def test_detectors_without_a_run_of_theirs_have_no_preset(batch, tmp_path):
    row = {"detectors": "256 + 128 + 64", "precision": "float32", "batch": 1, "median_ms": 3.0, "device": "x"}
    write_json(tmp_path / "bench.json", {"detectors": [row]})
    (tmp_path / "nothing").mkdir()
    assert measured_points(tmp_path / "nothing", tmp_path / "bench.json").method.tolist() == ["GRAD here, float32"]
    found = pd.DataFrame({"dataset": ["trays"], "own": [True], "file": ["a"]})
    assert not figures._same_detectors(found, [256], 1.0), "there is neither a run of LOCO nor one of AD"
