"""The paper's figures as data, and our figures beside them: no cell is a guess, and no run is counted twice."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import ROOT

from grad_nb.config import PRESETS, anywhere, enlarged, to_dict
from grad_nb.core.files import csv_field, read_json, write_json
from grad_nb.study.report import results
from grad_nb.study.tables import (
    HERE,
    VARIANTS,
    WHOLE,
    all_tables,
    cell,
    collect,
    noted_figures,
    published,
    published_grid,
    table_1,
    table_2,
    table_3,
    table_4,
    table_10,
    to_latex,
    to_markdown,
    values,
    variant,
    write_tables,
)

AD = (
    "carpet grid leather tile wood bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor zipper"
).split()
LOCO = "breakfast_box juice_bottle pushpins screw_bag splicing_connectors".split()


def result(
    folder,
    dataset,
    category,
    seed,
    image,
    pixel=None,
    mean=None,
    preset="paper",
    by_level=None,
    trivial=(0.5, 0.6),
    notes=(),
    **detector,
):
    "Write a result.json as the evaluate stage does."
    figures = lambda pooled, mean=None: {
        "image_auroc": pooled,
        "image_auroc_mean": pooled if mean is None else mean,
        "by_type": {},
    }
    config = to_dict(PRESETS[preset])
    config["detector"] |= detector
    made = figures(image, mean) | {
        "pixel_auroc": pixel,
        "preset": preset,
        "dataset": dataset,
        "category": category,
        "seed": seed,
        "config": config,
        "trivial": dict(zip(("gaussian", "nearest"), map(figures, trivial))),
        "device": "cpu (1 threads)",
        "notes": list(notes),
    }
    if by_level:
        made["by_level"] = {str(n): figures(x) for n, x in by_level.items()}
    path = folder / preset / dataset / category / f"seed{seed}" / "result.json"
    write_json(path, made)
    return path


# what the paper says


def test_published_is_whole():
    figures = published()
    assert dict(figures.groupby("table").size()) == {1: 48, 2: 15, 3: 12, 4: 12, 10: 225}
    assert not figures.duplicated(["table", "method", "category", "metric"]).any() and figures.value.notna().all()
    assert figures[figures.unit == "%"].value.between(50, 100).all() and set(figures.unit) == {"%", "ms", "pictures/s"}
    for table, row in ((n, f) for n, f in figures.groupby("table")):
        assert set(row.source) == {f"Dai et al., AAAI 2024, Table {table}"}
    assert set(published(10).category) == {*AD, "average"} and set(published(1).category) == {*LOCO, "average"}
    per_column = published(10).groupby(["method", "metric"]).size()
    assert (
        per_column.drop([("FCDD", "image_auroc")]).eq(16).all()
        and per_column["FCDD", "image_auroc"] == 1
        and ("DSR", "pixel_auroc") not in per_column
    )


@pytest.mark.parametrize(
    "table, metric, deviating",
    [
        (1, "image_auroc", {"SINBAD": -1.82, "GRAD": -0.6}),
        (10, "image_auroc", {"PSVDD": -2.84}),
        (10, "pixel_auroc", {"PSVDD": 0.43, "FCDD": 0.5, "GRAD": 0.21}),
    ],
)
def test_averages_are_the_means_of_the_rows_but_for_those_of_the_paper_that_are_not(table, metric, deviating):
    grid = published_grid(table, metric)
    difference = (grid.loc["average"] - grid.drop(index="average").mean()).dropna()
    off = difference[difference.abs() > 0.1 + 1e-9]
    assert off.round(2).to_dict() == deviating


def test_tables_2_and_3_agree_with_others():
    for metric in ("image_auroc", "pixel_auroc"):
        assert (
            published_grid(2, metric, "method")["average"].dropna().to_dict()
            == published_grid(10, metric).loc["average"].dropna().to_dict()
        )
    latency, fps = (published_grid(3, m, "method").iloc[:, 0] for m in ("latency", "throughput"))
    assert np.allclose(1000 / latency, fps, atol=0.1) and 16 < fps["GRAD"] / fps["GCAD"] < 17


def test_table_4_has_the_gains_that_the_text_names():
    grid = published_grid(4, "image_auroc", "method")
    assert list(grid.index) == list(VARIANTS.values()) and list(grid.columns) == ["level 34", "level 68", "level 136"]
    assert grid.diff().iloc[1:].round(1).to_numpy().tolist() == [[3.4, 3.1, 0.9], [0.9, 1.6, 6.9], [2.7, 2.9, 3.0]]


@pytest.mark.parametrize(
    "table, method, category, metric, value",
    [
        (1, "GRAD", "pushpins", "image_auroc", 99.7),
        (1, "SPADE", "screw_bag", "image_auroc", 53.2),
        (2, "DRAEM", "average", "pixel_auroc", 97.3),
        (3, "GRAD", "", "latency", 0.799),
        (4, "baseline", "level 136", "image_auroc", 64.3),
        (10, "DSR", "wood", "image_auroc", 96.3),
        (10, "GRAD", "wood", "pixel_auroc", 87.2),
        (10, "GRAD", "carpet", "image_auroc", 98.2),
        (10, "IGD", "tile", "pixel_auroc", 78.0),
        (10, "GRAD", "zipper", "image_auroc", 99.7),
        (10, "NSA", "wood", "image_auroc", 97.5),
        (10, "PSVDD", "capsule", "pixel_auroc", 76.7),
    ],
)
def test_single_figures(table, method, category, metric, value):
    row = published(table).query("method == @method and category == @category and metric == @metric")
    assert list(row.value) == [value]


# the paper's own text, where it is at hand


@pytest.fixture(scope="module")
def paper() -> list[str]:
    "The lines of the paper's text; the tests are skipped where it is absent."
    path = Path(os.environ.get("GRAD_NB_PAPER") or ROOT / "../shared/paper.md")
    if not path.is_file():
        pytest.skip("the paper's text is not here; set GRAD_NB_PAPER to a file of it to run this test")
    return path.read_text(encoding="utf-8").splitlines()


def rows_above(lines: list[str], table: int) -> list[list[str]]:
    "The cells of a table, which stands above its caption, without the citations."
    end = next(i for i, line in enumerate(lines) if line.startswith(f"Table {table}:")) - 1
    while not lines[end].strip():
        end -= 1
    start = end
    while lines[start - 1].strip():
        start -= 1
    return [[cell.replace("(?)", "").strip() for cell in line.split("\t")] for line in lines[start : end + 1]]


def figures_in(text: str) -> list[float]:
    "The figures of a row in their order; nan for a dash."
    return [float("nan") if x == "-" else float(x) for x in re.findall(r"(?<![\w-])(?:\d+\.?\d*|-)(?![\w-])", text)]


@pytest.mark.parametrize(
    "table, metrics, rows",
    [
        (1, ["image_auroc"], "category"),
        (2, ["pixel_auroc", "image_auroc"], "method"),
        (3, ["latency", "throughput"], "method"),
        (4, ["image_auroc"], "method"),
    ],
)
def test_published_is_what_the_text_prints(paper, table, metrics, rows):
    printed = [values for row in rows_above(paper, table) if len(values := figures_in(" ".join(row[1:]))) >= 2]
    grids = [published_grid(table, metric, rows) for metric in metrics]
    ours = np.stack(grids, -1).reshape(len(grids[0]), -1) if len(grids) > 1 else grids[0].to_numpy()
    assert np.array_equal(np.array(printed), ours, equal_nan=True), (printed, ours)


def test_published_is_what_the_text_of_table_10_prints(paper):
    pairs = [re.findall(r"\(\s*(-|[\d.]+)\s*,\s*(-|[\d.]+)\s*\)", " ".join(row)) for row in rows_above(paper, 10)]
    number = lambda x: float("nan") if x == "-" else float(x)
    printed = np.array([[[number(x) for x in pair] for pair in row] for row in pairs if row])
    ours = np.stack([published_grid(10, metric) for metric in ("pixel_auroc", "image_auroc")], -1)
    assert printed.shape == (16, 8, 2) and np.array_equal(printed, ours, equal_nan=True)


def test_no_such_table():
    with pytest.raises(ValueError, match="no table 5"):
        published(5)


# what was measured


def test_nothing_run_is_all_dashes(tmp_path):
    tables = all_tables(collect(tmp_path))
    for table in tables.values():
        ours = [table[c] for c in table if "here" in c or c in HERE.values()] + [
            table.loc[r] for r in table.index if r in HERE.values() and "(paper)" not in r
        ]
        assert ours and all(set("".join(c)) <= set("-/ ") for c in ours), table


def test_cells_over_seeds(tmp_path):
    for seed, x in enumerate((0.95, 0.96, 0.97)):
        result(tmp_path, "mvtec_loco", "juice_bottle", seed, 0.5, mean=x)
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.999, pixel=0.968, mean=0.5)
    found = collect(tmp_path)
    one, ten = table_1(found), table_10(found)
    assert one.loc["juice_bottle", "GRAD here"] == "96.0 ± 1.0", "LOCO's figure is the mean over the kinds of anomalies"
    assert one.loc["juice_bottle", "per-pixel Gaussian"] == "50.0 ± 0.0" and one.loc["average", "GRAD here"] == "-"
    assert ten.loc["bottle", "GRAD here"] == "96.8 / 99.9" and ten.loc["bottle", "nearest picture"] == "- / 60.0"
    assert any("not run: breakfast_box" in note for note in one.attrs["notes"]) and any(
        "seeds 0, 1, 2" in note for note in one.attrs["notes"]
    )


def test_an_average_needs_every_category_with_the_same_seed(tmp_path):
    for i, name in enumerate(AD):
        for seed in (0, 1):
            result(tmp_path, "mvtec_ad", name, seed, 0.9 + 0.001 * i + 0.02 * seed, pixel=0.8 + 0.001 * i)
    whole = table_2(collect(tmp_path))
    assert list(whole.loc["GRAD here"]) == ["80.7 ± 0.0", "91.7 ± 1.4"]
    assert table_10(collect(tmp_path)).loc["average", "GRAD here"] == "80.7 ± 0.0 / 91.7 ± 1.4"
    (tmp_path / "paper/mvtec_ad/pill/seed1/result.json").unlink()
    assert list(table_2(collect(tmp_path)).loc["GRAD here"]) == ["80.7", "90.7"], "seed 1 is not whole any more"
    said = table_2(collect(tmp_path)).attrs["notes"]
    assert "the average is over the seeds that all categories have: 0" in said
    (tmp_path / "paper/mvtec_ad/wood/seed0/result.json").unlink()
    assert list(table_2(collect(tmp_path)).loc["GRAD here"]) == ["-", "-"]
    assert "no seed has all categories, so there is no average" in table_2(collect(tmp_path)).attrs["notes"]


def test_what_is_left_out_of_a_table_is_told_of_and_other_parts_are_not(tmp_path):
    result(tmp_path, "mvtec_loco", "pushpins", 0, 0.9)
    result(tmp_path, "mvtec_loco", "juice_bottle", 0, 0.9, alpha_1=0.0)
    result(tmp_path, "mvtec_ad", "my_part", 7, 0.9, pixel=0.8)
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.9, pixel=0.8)
    said = table_1(collect(tmp_path)).attrs["notes"]
    assert "run with other parts than its preset has, and left out: juice_bottle" in said
    assert any(note.startswith("not run: breakfast_box, screw_bag") for note in said)
    said = " ".join(table_10(collect(tmp_path)).attrs["notes"])
    assert "seeds 0, on" in said and "my_part" not in said


def test_the_tables_of_runs_with_a_detector_of_level_1_can_be_made():
    tables = all_tables(collect(ROOT / "results" / "level-1"), "demo")
    assert any("level_1=True" in note for note in tables["table_10"].attrs["notes"]), list(tables)


def test_undefined_is_not_a_number_and_spoils_the_average(tmp_path):
    for name in AD:
        result(tmp_path, "mvtec_ad", name, 0, 0.9, pixel=None if name == "pill" else 0.8)
    found = collect(tmp_path)
    assert table_10(found).loc["pill", "GRAD here"] == "n/a / 90.0" and list(table_2(found).loc["GRAD here"]) == [
        "n/a",
        "90.0",
    ]


def test_ablation_by_level_and_by_settings_not_by_folder(tmp_path):
    off = dict(alpha_1=0, alpha_2=0, noisy_reweighting=False, tail_reweighting=False)
    for name in LOCO:
        result(tmp_path / "x", "mvtec_loco", name, 0, 0.8, by_level={34: 0.7, 68: 0.6, 136: 0.5}, **off)
        result(tmp_path / "y", "mvtec_loco", name, 0, 0.9, by_level={34: 0.8, 68: 0.75, 136: 0.55})
        result(tmp_path / "z", "mvtec_loco", name, 0, 0.9, by_level={34: 0.1}, alpha_1=0)
    found = collect(tmp_path)
    four = table_4(found)
    assert list(four["level 68 here"]) == ["60.0", "-", "-", "75.0", "50.0", "60.0"]
    assert list(four["level 68 (paper)"]) == ["77.8", "80.9", "82.5", "85.4", "-", "-"]
    assert table_1(found).loc["pushpins", "GRAD here"] == "90.0", "the main tables show the whole method"
    assert set(found.variant) == {"baseline", WHOLE, "other"}


def test_the_ablation_averages_over_what_was_run_and_says_so(tmp_path):
    off = dict(alpha_1=0, alpha_2=0, noisy_reweighting=False, tail_reweighting=False)
    on = dict(alpha_1=1, alpha_2=1e-3)
    rows = [off, off | on, on | {"tail_reweighting": False}, on]
    for seed in (0, 7):
        result(tmp_path / f"own{seed}", "trays", "trays", seed, 0.9, preset="demo", by_level={34: 0.3})
    assert table_4(collect(tmp_path))["level 34 here"].tolist()[:4] == ["-"] * 4
    for i, row in enumerate(rows):
        result(tmp_path / f"t{i}", "trays", "trays", 0, 0.8, preset="demo", by_level={34: 0.5 + i / 10}, **row)
    trays = table_4(collect(tmp_path))
    assert trays["level 34 here"].tolist()[:4] == ["50.0", "60.0", "70.0", "80.0"]
    assert trays.attrs["notes"][0].startswith("averages here over trays; the published averages are over the five")
    assert any("seeds 0, on" in note for note in trays.attrs["notes"]), "those of the variants, not of every run"
    for i, row in enumerate(rows):
        result(tmp_path / f"j{i}", "mvtec_loco", "juice_bottle", 0, 0.8, preset="demo", by_level={34: 0.9}, **row)
    result(tmp_path / "b", "mvtec_loco", "breakfast_box", 0, 0.8, preset="demo", by_level={34: 0.1}, **off)
    loco = table_4(collect(tmp_path))
    assert loco["level 34 here"].tolist()[:4] == ["90.0"] * 4, "of LOCO what has all rows"
    assert "over juice_bottle;" in loco.attrs["notes"][0]
    assert table_4(collect(tmp_path), dataset="trays")["level 34 here"].tolist() == trays["level 34 here"].tolist()


def test_a_device_is_named_once(tmp_path):
    for name, device in (("bottle", "cpu (1 threads, bf16)"), ("pill", "cpu (1 threads, bf16), cpu (2 threads, bf16)")):
        path = result(tmp_path, "mvtec_ad", name, 0, 0.9)
        write_json(path, read_json(path) | {"device": device})
    notes = table_10(collect(tmp_path)).attrs["notes"]
    assert any(note.endswith("on cpu (1 threads, bf16), cpu (2 threads, bf16)") for note in notes), notes


def test_a_preset_without_regularisers_fills_the_main_tables(tmp_path):
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.91, preset="demo")
    result(tmp_path / "x", "mvtec_ad", "bottle", 0, 0.5, preset="demo", alpha_1=1.0, alpha_2=1e-3)
    assert table_10(collect(tmp_path)).loc["bottle", "GRAD here"].endswith("91.0")


def test_runs_with_other_parts_fill_the_main_tables_where_there_are_no_others(tmp_path):
    parts = {"alpha_1": 1.0, "alpha_2": 1e-3}
    for seed in (0, 1):
        result(tmp_path, "mvtec_ad", "bottle", seed, 0.9, preset="fast", **parts)
    table = table_10(collect(tmp_path))
    assert table.loc["bottle", "GRAD here"].endswith("90.0 ± 0.0")
    assert "bottle, seeds 0, 1: run with detector.alpha_1=1.0, detector.alpha_2=0.001" in table.attrs["notes"]
    result(tmp_path / "x", "mvtec_ad", "bottle", 2, 0.5, preset="fast")
    table = table_10(collect(tmp_path))
    assert table.loc["bottle", "GRAD here"].endswith("50.0"), "those of the preset, where there are any"
    assert not any("run with" in note for note in table.attrs["notes"])


def test_settings_that_a_preset_never_has_by_itself_are_told_of(tmp_path):
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.9, preset="fast")
    lying_anywhere = result(tmp_path, "mvtec_ad", "screw", 0, 0.7, preset="fast")
    made = read_json(lying_anywhere)
    made["config"] = to_dict(enlarged(anywhere(PRESETS["fast"])))
    made["config"] |= {"one_network": True, "student": made["config"]["student"] | {"steps": 7}}
    write_json(lying_anywhere, made)
    assert not any("run with" in note for note in table_10(collect(tmp_path)).attrs["notes"])
    result(tmp_path, "mvtec_ad", "cable", 0, 0.5, preset="fast", steps=10)
    told = [note for note in table_10(collect(tmp_path)).attrs["notes"] if "run with" in note]
    assert told == ["cable, seeds 0: run with detector.steps=10"]


def test_a_result_whose_stages_were_made_again_is_told_of(tmp_path):
    path = result(tmp_path, "mvtec_ad", "bottle", 0, 0.9)
    write_json(path, read_json(path) | {"stages": {"detect-034": {"fingerprint": "a"}}})
    write_json(path.with_name("detect-034.json"), {"fingerprint": "a"})
    assert not any("changed since" in note for note in table_10(collect(tmp_path)).attrs["notes"])
    write_json(path.with_name("detect-034.json"), {"fingerprint": "b"})
    told = [note for note in table_10(collect(tmp_path)).attrs["notes"] if "changed since" in note]
    assert told == [f"bottle: detect-034 changed since {path} was written; run its table again"]


def test_pairs_of_figures_are_no_formulas():
    for text in ("- / 98.2", "99.1 ± 0.3 / -", "- / -", "-1.5", "-"):
        assert csv_field(text) == text
    for text in ("-1+1", "- / =A1", "-A1 / 3"):
        assert csv_field(text) == f"'{text}"


def test_variants():
    on = dict(alpha_1=1, alpha_2=1e-3, noisy_reweighting=True, tail_reweighting=True)
    assert variant(on) == WHOLE and variant(on | {"tail_reweighting": False}) == "+ Noisy Reweighting"
    assert variant(on | {"noisy_reweighting": False}) == variant(on | {"alpha_2": 0}) == "other"


def test_several_presets_and_doubles_are_refused(tmp_path):
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.9, preset="paper")
    result(tmp_path, "mvtec_ad", "bottle", 0, 0.8, preset="fast")
    with pytest.raises(ValueError, match="several presets"):
        table_10(collect(tmp_path))
    assert table_10(collect(tmp_path), "fast").loc["bottle", "GRAD here"].endswith("80.0")
    result(tmp_path / "again", "mvtec_ad", "bottle", 0, 0.7, preset="fast")
    with pytest.raises(ValueError, match="are both fast mvtec_ad bottle 0"):
        collect(tmp_path)


def test_seeds_that_were_not_run_alike_are_told_of(tmp_path):
    for seed in (0, 1):
        result(tmp_path, "mvtec_ad", "bottle", seed, 0.9)
    old = result(tmp_path, "mvtec_ad", "carpet", 0, 0.9)
    made = read_json(old)
    del made["config"]["generator"]["spacing"]
    made["config"]["detector"]["same_jitter"] = False
    made["config"]["student"]["steps"] += 1  # of a network that there is not
    write_json(old, made)  # of a version without the one setting, and with the other
    result(tmp_path, "mvtec_ad", "carpet", 1, 0.9)
    assert not any("same settings" in note for note in table_10(collect(tmp_path)).attrs["notes"])
    result(tmp_path, "mvtec_ad", "bottle", 2, 0.5, steps=10)
    assert (
        "mvtec_ad/bottle: the seeds were not run with the same settings and data"
        in table_10(collect(tmp_path)).attrs["notes"]
    )


@pytest.mark.parametrize("text, said", [("{}", "not a result"), ("[1]", "not a result"), ("{", "not valid JSON")])
def test_a_damaged_result_is_named(tmp_path, text, said):
    path = result(tmp_path, "mvtec_ad", "bottle", 0, 0.9)
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as e:
        collect(tmp_path)
    assert str(path) in str(e.value)


def test_one_level_is_the_level_of_the_configuration(tmp_path):
    result(tmp_path, "trays", "trays", 0, 0.82, pixel=0.84, preset="demo", notes=["a note"])
    found = collect(tmp_path)
    assert list(values(found, "trays", ["trays"], "image_auroc_mean", level=34)) == [82.0]
    assert list(values(found, "trays", ["trays"], "image_auroc_mean", level=34, variant="other")) == [82.0], (
        "demo is no row of Table 4"
    )
    assert "trays: a note" in table_1(found).attrs["notes"] and list(table_1(found).index)[-1] == "trays"


def test_speed(tmp_path):
    from grad_nb.bench.detectors import bench_detectors

    rows = bench_detectors((64,), "cpu", runs=2, width=0.1)
    write_json(tmp_path / "bench.json", {"detectors": rows, "stages": []})
    table = table_3(tmp_path / "bench.json")
    assert table.equals(table_3(rows)) and len(table) == 7 and "batch 1, float32" in table.iloc[-1].protocol
    assert table.loc["GRAD (paper)", "latency (ms)"] == "0.799" and table_3().loc["GRAD here"].eq("-").all()
    more = {"protocol": [rows[0] | {"way": "one graph"}], "peers": [rows[0] | {"method": "P"}, {"error": "x"}]}
    write_json(tmp_path / "bench.json", {"detectors": rows, "missing": ["other detectors: no room"], **more})
    whole = table_3(tmp_path / "bench.json")
    assert len(whole) == 9 and "one captured graph" in whole.iloc[-2].protocol and whole.index[-1] == "P"
    assert "width 0.1 of Table 8" in whole.iloc[-2].protocol
    assert whole.attrs["notes"][-1] == "not measured here: other detectors: no room"
    write_json(tmp_path / "other.json", {"detectors": [{"size": 3}]})
    with pytest.raises(ValueError, match="other.json has no rows of grad_bench"):
        table_3(tmp_path / "other.json")
    for other in ([1], {"x": 1}):
        write_json(tmp_path / "other.json", other)
        with pytest.raises(ValueError, match="other.json is not a file of grad_bench"):
            table_3(tmp_path / "other.json")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 100), st.just(float("nan"))), max_size=6))
def test_a_cell_says_what_was_measured(x):
    text, defined = cell(x), [v for v in x if v == v]
    if not x:
        assert text == "-"
    elif not defined:
        assert text == "n/a"
    else:
        mean, _, sd = text.partition(" ± ")
        assert abs(float(mean) - sum(defined) / len(defined)) <= 0.05 + 1e-9 and bool(sd) == (len(defined) > 1)
        if sd:
            assert abs(float(sd) - pd.Series(defined).std()) <= 0.05 + 1e-9


def test_files(tmp_path):
    result(tmp_path / "runs", "mvtec_loco", "juice_bottle", 0, 0.9)
    tables = all_tables(collect(tmp_path / "runs"))
    files = write_tables(tmp_path / "tables", tables)
    assert sorted(p.name for p in tmp_path.glob("tables/*")) == sorted(
        f"table_{n}.{e}" for n in (1, 2, 3, 4, 10) for e in ("csv", "md", "tex")
    )
    assert len(files) == 15
    back = pd.read_csv(tmp_path / "tables/table_1.csv", index_col=0, dtype=str)
    assert back.loc["juice_bottle"].to_dict() == tables["table_1"].loc["juice_bottle"].to_dict()
    lines = to_markdown(tables["table_10"]).split("\n\n")[0].splitlines()
    assert len(lines) == 18 and len({line.count("|") for line in lines}) == 1
    tex = to_latex(tables["table_4"])
    assert tex.count(r"\\") == 7 and not any(bad in tex for bad in ("±", " & &")) and json.dumps(tex)


NASTY = [
    "$\\frac{$",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "{x} {0}",
    "a\nb",
    "`id`",
    "**b** [l](x)",
    "\x1b[31m",
    "\u202eb",
    "~^\\x",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_name_that_others_chose_is_only_shown(name):
    table = pd.DataFrame({name: ["1"]}, index=pd.Index([name], name="category"))
    table.attrs["notes"] = [f"averages over {name}"]
    text = to_markdown(table)
    assert len(text.splitlines()) == 5 and all(
        line.count("|") - line.count("\\|") == 3 for line in text.splitlines()[:3]
    )
    assert "\x1b" not in text and "\u202e" not in text
    for special in "<$`*[":
        assert text.count(special) == text.count(f"\\{special}")
    tex = to_latex(table)
    for special in "$~^%_":
        assert all(before in "\\{" for before in re.findall(rf"(.)\{special}", tex)), tex
    assert "\\frac" not in tex and "\\x" not in tex


def test_noted_figures_stand_in_the_order_of_the_file(tmp_path):
    file = tmp_path / "notes.csv"
    lines = ["question,setting,figure,value", "a,later,z,1.50", "a,earlier,z,2", "a,earlier,b,x", "other,s,f,3"]
    file.write_text("\n".join(lines), encoding="utf-8")
    rows = noted_figures(file, "a").split("\n\n")[0].splitlines()
    assert rows == ["|  | z | b |", "| --- | --- | --- |", "| later | 1.50 | – |", "| earlier | 2 | x |"]
    with pytest.raises(ValueError, match="nothing on 'b'; it has 'a', 'other'"):
        noted_figures(file, "b")


def test_rows_beside_a_run_are_no_runs_also_where_a_row_has_its_very_settings(tmp_path):
    "As with `paper` on MVTec AD, whose one detector has the losses of the last row."
    by_level = {34: 0.7, 68: 0.8, 136: 0.6}
    run = result(tmp_path / "x", "mvtec_ad", "bottle", 0, 0.95, 0.9, by_level={34: 0.9})
    row = result(tmp_path / "y", "mvtec_ad", "bottle", 0, 0.5, 0.1, by_level=by_level)
    whole = tmp_path / "runs" / run.relative_to(tmp_path / "x")
    write_json(whole, read_json(run))
    of_row = read_json(row)
    of_row["config"]["levels_ad"] = of_row["config"]["levels_loco"]
    write_json(whole.parent / "table4/long-tail/result.json", of_row)
    found = collect(tmp_path / "runs")
    assert table_10(found).loc["bottle", "GRAD here"] == "90.0 / 95.0"
    four = table_4(found, dataset="mvtec_ad")
    shown = [four.loc[WHOLE, f"level {n} here"] for n in (34, 68, 136)]
    assert shown == ["70.0", "80.0", "60.0"], "the detectors of the row, and not the one of the run"
    assert not any("same settings" in note for note in four.attrs["notes"]), "they are no seeds of each other"
    assert list(results(tmp_path / "runs", "paper")) == [whole]
    (tmp_path / "table4").mkdir()
    elsewhere = (tmp_path / "runs").rename(tmp_path / "table4/runs")
    assert len(results(elsewhere, "paper")) == 1, "whatever the folders above are called"
