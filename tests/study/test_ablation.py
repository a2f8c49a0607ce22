"""An ablation.

Every training is done once, processes share the work, intervals can be checked by hand, and no picture is kept.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import ROOT
from sklearn.metrics import roc_auc_score

from grad_nb.config import PRESETS, override, to_dict
from grad_nb.core.files import lock, read_json, write_json
from grad_nb.datasets.readers import DataError
from grad_nb.runs.stages import generate_key, load_normals, open_run
from grad_nb.study.ablation import (
    KEYS,
    METRICS,
    SETS,
    TABLE_4,
    Piece,
    _refuse_other_sets,
    _refuse_others,
    ablate,
    ablation_chart,
    cell_done,
    cells,
    collect_results,
    common_seeds,
    compare,
    compare_generators,
    curve_chart,
    in_order,
    loss_curve,
    open_ablation,
    parse_variants,
    picture_sheets,
    pictures_interval,
    pieces,
    rank_correlation,
    read_results,
    run_pieces,
    seed_interval,
    slug,
    table_4_figures,
    tables_of,
)
from grad_nb.study.commands import grad_ablate
from grad_nb.study.results import collect_folder
from grad_nb.study.selection import SelectionConfig, selection_split
from grad_nb.study.tables import collect, table_4, to_markdown, variant

TINY = (
    "generator.size=64 generator.width=8 generator.steps=4 generator.batch=2 generator.crop=0 "
    "generator.n_samples=4 generator.sample_steps=2 "
    "detector.width=0.1 detector.steps=4 detector.pictures=4 detector.block=1 detector.patches=32 "
    "evaluation.map_size=64"
)
TWO = {"baseline": dict(TABLE_4["baseline"]), "+ Long-tail Reweighting": dict(TABLE_4["+ Long-tail Reweighting"])}


def opened(data, root, variants=TWO, seeds=(0, 1), extra="", **options):
    return open_ablation(
        data,
        "trays",
        "demo",
        seeds,
        variants,
        TINY + extra,
        root / "runs",
        root / "ablation",
        "cpu",
        "per_kind=3 share=0.3",
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    "A whole, tiny ablation: two variants, two seeds."
    root = tmp_path_factory.mktemp("ablation")
    ablation = opened(data, root)
    said = []
    ablate(ablation, said.append)
    return ablation, root, said


# variants


@pytest.mark.parametrize("name", PRESETS)
def test_every_set_of_variants_fits_every_preset(name):
    for part in SETS:
        found = parse_variants(part, PRESETS[name])
        made = [override(PRESETS[name], changes) for changes in found.values()]
        assert len({str(to_dict(p)) for p in made}) == len(made) > 3, f"two variants of {part} are the same"


def test_regularisers_are_as_strong_as_in_the_preset():
    own = override(PRESETS["fast"], {"detector.alpha_1": 0.25, "detector.alpha_2": 0.5})
    found = parse_variants("table4 removed", own)
    strength = lambda name: (found[name]["detector.alpha_1"], found[name]["detector.alpha_2"])
    assert (
        strength("baseline") == (0, 0)
        and strength("+ Long-tail Reweighting") == (0.25, 0.5)
        and strength("all but gradient penalty") == (0.25, 0)
    )
    weighed = parse_variants("sensitivity", own)
    assert {path for changes in weighed.values() for path in changes}.isdisjoint(
        {"detector.alpha_1", "detector.alpha_2"}
    ), "these stay as in the preset"
    assert weighed["lr 0.003"] == {**weighed["the preset with weights"], "detector.lr": pytest.approx(0.003)}
    assert parse_variants("regularizers", own)["alpha_2 5"] == {
        **found["+ Long-tail Reweighting"],
        "detector.alpha_2": 5.0,
    }
    assert parse_variants({"mine": {"detector.alpha_1": 1.0}}, own) == {"mine": {"detector.alpha_1": 1.0}}, (
        "what is asked for by hand is not touched"
    )


def test_variants_are_what_they_are_called():
    none = override(PRESETS["fast"], {"detector.alpha_1": 0, "detector.alpha_2": 0})
    named = parse_variants("table4 removed added", none)
    switches = lambda name: [
        getattr(override(none, named[name]).detector, k)
        for k in ("alpha_1", "alpha_2", "noisy_reweighting", "tail_reweighting", "wrong_coordinates")
    ]
    assert switches("baseline") == [0, 0, False, False, True] and switches("+ Regularization") == [
        1,
        1e-3,
        False,
        False,
        True,
    ]
    assert switches("+ Noisy Reweighting") == [1, 1e-3, True, False, True] and switches("+ Long-tail Reweighting") == [
        1,
        1e-3,
        True,
        True,
        True,
    ]
    assert switches("all but gradient penalty") == [1, 0, True, True, True] and switches(
        "only long-tail reweighting"
    ) == [0, 0, False, True, True]
    assert switches("all but wrong coordinates") == [1, 1e-3, True, True, False] and switches(
        "all but regularization"
    ) == [0, 0, True, True, True]
    assert [variant(to_dict(override(PRESETS["fast"], TABLE_4[n]))["detector"]) for n in TABLE_4] == list(TABLE_4)


@pytest.mark.parametrize(
    "text, said",
    [
        ("table9", "no set of variants table9"),
        ('{"a": ', "not valid JSON"),
        ('{"a": {"detector.nothing": 1}}', "no setting 'nothing'"),
        ('{"a": "detector.steps"}', "setting=value"),
        ("{}", "at least one"),
        ('{"a +": {}, "A plus": {}}', "share the folder 'a-plus'"),
        ('{"ok": {}, "...": {}}', "'...' has no letter"),
        ('{"a": 3}', "the changes of 'a' are settings and their values, not 3"),
        ('{"a": null}', "the changes of 'a' are settings and their values, not None"),
        ('{"a": ["detector.steps=5"]}', "the changes of 'a' are settings"),
        ('{"a": {"levels_ad": [{"level": 34}]}}', "levels_ad are rows with level, size and generators"),
        ('{"a": {"levels_ad": [3]}}', "levels_ad are rows with level, size and generators"),
    ],
)
def test_variants_that_cannot_be_are_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_variants(text, PRESETS["demo"])


@given(st.text(min_size=1, max_size=30))
def test_a_slug_is_a_plain_folder(name):
    made = slug(name)
    assert (
        set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
        and made not in (".", "..")
        and not made.startswith((".", "-"))
    )


# running


def test_records_are_whole(done, data):
    ablation, root, said = done
    found = read_results(root / "ablation")
    assert len(found) == 4 and not found[list(METRICS)].isna().any().any()
    assert found[[*METRICS, "ess_neg"]].ge(0).all().all() and found[list(METRICS)].le(100).all().all()
    record = found.record[0]
    assert record["counts"] == {"train": 6, "held_out": 2, "test": 20} and record["config"]["detector"]["alpha_1"] == 0
    assert record["data_sha256"] == ablation.run.data_sha256 and record["selection"]["pseudo"] == dict.fromkeys(
        ("cut_paste", "scar", "blob", "part_swap"), 3
    )
    assert (
        set(record["versions"]) >= {"grad_nb", "torch"}
        and set(record["losses"]) >= {"rbce", "feat", "grad"}
        and record["test"]["by_type"].keys() == {"logical_anomalies", "structural_anomalies"}
    )
    scores = found.scores[0]
    assert {k: len(v) for k, v in scores.items()} == {"good": 6, "logical_anomalies": 8, "structural_anomalies": 6}
    each = [
        roc_auc_score(np.r_[np.zeros(6), np.ones(len(scores[k]))], np.r_[scores["good"], scores[k]])
        for k in scores
        if k != "good"
    ]
    assert found.image_auroc_mean[0] == pytest.approx(100 * np.mean(each)), "the kept scores give the kept figures"


def test_what_is_told_on_the_way_is_not_the_test_figures(done):
    told = " ".join(done[2])
    assert "criterion" in told and "auroc" not in told.lower() and "failed" not in told


def test_contrastive_sets_are_made_once_per_seed_and_shared_with_normal_runs(done):
    ablation, root, _ = done
    assert sorted(p.parent.name for p in (root / "runs").rglob("generate-03.json")) == ["seed0", "seed1"]
    assert sum("contrastive set" in p.name for p in pieces(ablation)) == 2 * 3
    assert {c.run.folder for c in cells(ablation)} == {
        open_run(ablation.run.category.root.parent, "trays", "demo", s, root / "runs", TINY, "cpu", False).folder
        for s in (0, 1)
    }


def test_a_variant_of_the_generator_has_contrastive_sets_of_its_own(data, tmp_path):
    mixed = opened(
        data, tmp_path, {"a": {"detector.lr": 1e-4}, "b": {"detector.lr": 1e-3, "generator.sigma_g": 0.5}}, seeds=(0,)
    )
    folders = {c.name: c.run.folder for c in cells(mixed)}
    assert (
        mixed.part == "detector"
        and folders["a"] != folders["b"]
        and folders["b"].is_relative_to(tmp_path / "runs/variants/b")
    )


def test_nothing_runs_twice_and_only_what_changed_runs_again(done):
    ablation, root, _ = done
    before = {p: p.stat().st_mtime_ns for p in root.rglob("level-*.json")}
    said = []
    run_pieces(pieces(ablation), said.append)
    assert said == [f"{len(pieces(ablation))} of {len(pieces(ablation))} pieces are there already"]
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("level-*.json")}
    more = replace(ablation, variants={**TWO, "long": {"detector.steps": 5}}, seeds=(0, 1, 2))
    assert len([c for c in cells(more) if not cell_done(c)]) == 5
    other = replace(ablation, selection=SelectionConfig(per_kind=4))
    assert not any(cell_done(c) for c in cells(other)), "another selection is another result"


def test_a_damaged_output_is_made_again(done, tmp_path):
    import shutil

    shutil.copytree(done[1] / "ablation", tmp_path / "ablation")
    moved = replace(done[0], folder=tmp_path / "ablation")
    assert all(cell_done(c) for c in cells(moved))
    next((tmp_path / "ablation").rglob("detector-034.safetensors")).write_bytes(b"x")
    assert sum(cell_done(c) is None for c in cells(moved)) == 1


def test_same_seed_same_result_whoever_runs_it(done, data, tmp_path):
    again = opened(data, tmp_path, dict(list(TWO.items())[1:]), seeds=(1,))
    ablate(again, lambda line: None)
    a, b = (
        read_results(root / "ablation")
        .set_index(["variant", "seed"])
        .loc[("+ Long-tail Reweighting", 1), list(METRICS)]
        for root in (done[1], tmp_path)
    )
    assert a.equals(b)


def test_the_detector_never_sees_a_held_out_picture(done, monkeypatch, tmp_path):
    import grad_nb.study.ablation as room

    seen = {}

    def spy(folder, normals, sets, row, *rest):
        seen["normals"] = normals
        raise RuntimeError("enough seen")

    monkeypatch.setattr(room, "make_detector", spy)
    c = cells(done[0])[0]
    with pytest.raises(RuntimeError, match="enough"):
        room.train_cell(replace(c, ablation=replace(c.ablation, folder=tmp_path)))
    normals = load_normals(c.run)
    train, held = selection_split(normals, c.run.seed, c.ablation.selection)
    learnt = {p.tobytes() for p in seen["normals"]}
    assert learnt == {p.tobytes() for p in normals[train]} and not learnt & {p.tobytes() for p in normals[held]}


def test_a_variant_that_was_changed_is_not_averaged_with_what_it_was(data, tmp_path):
    ablation = opened(data, tmp_path)
    name, changes = next(iter(ablation.variants.items()))
    first = cells(ablation)[0]
    record = {"kind": ablation.part, "preset": ablation.run.preset.name, "overrides": ablation.overrides}
    record |= {"category": ablation.run.category.name, "variant": name, "changes": dict(changes) | {"steps": 3}}
    path = ablation.folder / "seed9" / "a.json"
    write_json(path, record)
    with pytest.raises(ValueError, match="is of a variant .* give another --folder, or move it away"):
        ablate(ablation)
    path.unlink()
    mine = first.folder / f"{first.stage}.json"
    for spelling in (ablation.overrides, ",".join(TINY.split()[::-1])):
        write_json(mine, record | {"overrides": spelling})
        _refuse_others(ablation)  # that one is made anew
    other = ablation.folder / "seed9" / "a.json"
    write_json(other, record | {"overrides": ",".join(TINY.split()[::-1])})
    with pytest.raises(ValueError, match="is of a variant .* give another --folder, or move it away"):
        _refuse_others(ablation)
    other.unlink()
    write_json(mine, record | {"overrides": TINY.replace("detector.steps=4", "detector.steps=5")})
    with pytest.raises(ValueError, match="steps=5 .* would be lost; give another --folder, or move it away"):
        ablate(ablation)


def test_results_of_other_pictures_or_of_another_selection_are_not_averaged_with_these(data, tmp_path):
    ablation = opened(data, tmp_path)
    name, changes = next(iter(ablation.variants.items()))
    record = {"kind": ablation.part, "preset": ablation.run.preset.name, "overrides": ablation.overrides}
    record |= {"category": ablation.run.category.name, "variant": name, "changes": dict(changes)}
    path = ablation.folder / "seed9" / "a.json"
    alike = {"data_sha256": ablation.run.data_sha256, "selection_config": asdict(ablation.selection)}
    write_json(path, record | alike)
    _refuse_others(ablation)
    for other, said in ({"data_sha256": "0"}, "pictures"), ({"selection_config": {}}, "settings of the selection"):
        write_json(path, record | alike | other)
        with pytest.raises(ValueError, match=f"a.json was made with other {said}.* give another --folder"):
            _refuse_others(ablation)


def test_contrastive_sets_of_other_settings_are_not_replaced(data, tmp_path):
    ablation = opened(data, tmp_path)
    cell = cells(ablation)[0]
    level = cell.run.level(cell.level).generators[0]
    path = cell.run.folder / f"generate-{level:02d}.json"
    write_json(path, {"fingerprint": generate_key(cell.run, level), "outputs": {}})
    _refuse_other_sets(ablation)
    write_json(path, {"fingerprint": "0", "outputs": {}})
    with pytest.raises(ValueError, match="which would be lost; give another --runs"):
        ablate(ablation)


def test_the_first_variant_that_is_asked_for_is_the_reference_whatever_was_trained_before():
    found = pd.DataFrame({"variant": ["all", "none", "more"], "order": [3, 0, 1]})
    assert list(in_order(found, ["all", "none"]).sort_values("order").variant) == ["all", "none"]
    assert in_order(found[:0], ["all"]).empty


def test_an_ablation_can_be_judged_and_has_seeds_that_there_are(data, tmp_path):
    assert opened(data, tmp_path).overrides == opened(data, tmp_path, extra=" ").overrides
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
            opened(data, tmp_path, seeds=(0, seed))
    shutil.copytree(data / "trays" / "train" / "good", tmp_path / "data" / "flat")
    with pytest.raises(DataError, match="has no test pictures"):
        open_ablation(tmp_path / "data", "flat", "demo", (0,), TWO, TINY, tmp_path, tmp_path, "cpu", progress=False)


def test_locked_pieces_are_left_to_the_process_that_has_them(tmp_path):
    order, made = [], set()
    piece = lambda name: Piece(
        name,
        tmp_path / f".{name}.lock",
        lambda: {"seconds": 0} if name in made else None,
        lambda: (order.append(name), made.add(name), {"seconds": 0})[-1],
    )
    todo = [piece(n) for n in "abc"]
    other = lock(todo[0].lock)

    def say(line):
        if "c" in order and not other.closed:
            made.add("a")  # the other process has finished it
            other.close()

    run_pieces(todo, say)
    assert order == ["b", "c"], "a was taken, then done by the other"


def test_a_process_waits_for_another_and_does_what_that_one_left(tmp_path):
    made = set()
    todo = [
        Piece("a", tmp_path / ".a", lambda: None, lambda: made.add("a") or {"seconds": 0}),
        Piece("b", tmp_path / ".b", lambda: None, lambda: made.add("b") or {"seconds": 0}, ("a",)),
    ]
    other = lock(todo[0].lock)
    threading.Timer(0.4, other.close).start()  # it ends without having done it
    start = time.perf_counter()
    run_pieces(todo, lambda line: None)
    assert made == {"a", "b"} and time.perf_counter() - start > 0.35


def test_a_piece_waits_for_what_it_needs_even_if_another_process_makes_it(tmp_path):
    told, made = [], {}
    piece = lambda name, *needs: Piece(
        name, tmp_path / f".{name}", lambda: made.get(name), lambda: made.setdefault(name, {"seconds": 0}), needs
    )
    todo = [piece("set"), piece("train", "set"), piece("free")]
    other = lock(todo[0].lock)

    def finish():
        made["set"] = {"seconds": 1}
        other.close()

    threading.Timer(0.4, finish).start()
    run_pieces(todo, told.append)
    assert [line.split("] ")[1] for line in told if line.startswith("[")] == ["free", "train"]


def test_a_failure_does_not_stop_the_others_and_is_told_at_the_end(tmp_path):
    def bad():
        raise ValueError("no such thing")

    made = []
    todo = [
        Piece("bad", tmp_path / ".a", lambda: None, bad),
        Piece("hangs on it", tmp_path / ".c", lambda: None, bad, ("bad",)),
        Piece("good", tmp_path / ".b", lambda: None, lambda: made.append(1) or {"seconds": 1}),
    ]
    with pytest.raises(RuntimeError, match="2 of 3 pieces failed; the first: bad: no such thing"):
        run_pieces(todo, lambda line: None)
    assert made == [1]


@pytest.mark.slow
def test_two_processes_share_an_ablation(data, tmp_path):
    variants = json.dumps({f"v{i}": {"detector.alpha_1": 0.0, "detector.sigma_c": 0.1 + i / 100} for i in range(4)})
    command = [
        sys.executable,
        "-m",
        "grad_nb.study.ablation",
        "--data",
        str(data),
        "--variants",
        variants,
        "--seeds",
        "0",
        "1",
        "--overrides",
        TINY,
        "--selection",
        "per_kind=3 share=0.3",
        "--runs",
        str(tmp_path / "runs"),
        "--folder",
        str(tmp_path / "ablation"),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--quiet",
    ]
    both = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    out = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    ran = [[line.split("] ")[1] for line in o.splitlines() if line.startswith("[")] for o, _ in out]
    assert not set(ran[0]) & set(ran[1]) and len(set(ran[0] + ran[1])) == 2 * (3 + 4) + 1, "every piece once"
    assert len(read_results(tmp_path / "ablation")) == 8


# intervals


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_difference_of_aurocs_is_what_the_bootstrap_is_centred_on(seed, mean_of_types):
    rng = np.random.default_rng(seed)
    draw = lambda: {
        "good": rng.integers(0, 8, 30).astype(float),
        "a": rng.integers(1, 9, 25).astype(float),
        "b": rng.integers(2, 10, 40).astype(float),
    }
    ours, reference = [draw() for _ in range(2)], [draw() for _ in range(2)]

    def auroc(s):
        pair = lambda kinds: roc_auc_score(
            np.r_[np.zeros(30), np.ones(sum(len(s[k]) for k in kinds))],
            np.concatenate([s["good"], *(s[k] for k in kinds)]),
        )
        return np.mean([pair("a"), pair("b")]) if mean_of_types else pair("ab")

    d = np.mean([auroc(a) - auroc(b) for a, b in zip(ours, reference)])
    low, high = pictures_interval(ours, reference, mean_of_types)
    assert low <= d + 0.01 and d - 0.01 <= high and low < high and high - low < 0.6
    narrow = pictures_interval(ours, reference, mean_of_types, level=0.001)
    assert abs(np.mean(narrow) - d) < 0.02


def test_the_bootstrap_is_paired():
    rng = np.random.default_rng(0)
    base = {"good": rng.normal(0, 1, 40), "a": rng.normal(1, 1, 40)}
    twin = {k: v * 2 + 3 for k, v in base.items()}  # the same order
    assert pictures_interval([base], [twin]) == (0, 0)
    other = {"good": rng.normal(0, 1, 40), "a": rng.normal(1, 1, 40)}
    assert np.diff(pictures_interval([base], [other]))[0] > 0.1


def test_the_bootstrap_covers():
    "Of many imaginary test sets about 95 % have the true difference in their interval."
    rng, hits, true = np.random.default_rng(1), 0, 0.0
    for _ in range(120):
        sets = [{"good": rng.normal(0, 1, 60), "a": rng.normal(1, 1, 60)} for _ in range(2)]
        low, high = pictures_interval(sets[:1], sets[1:], n=400)
        hits += low <= true <= high
    assert 0.88 <= hits / 120 <= 1


def test_without_anomalies_or_normals_there_is_no_interval():
    assert np.isnan(pictures_interval([{"good": np.ones(3)}], [{"good": np.ones(3)}])).all()
    assert np.isnan(
        pictures_interval([{"good": np.ones(0), "a": np.ones(2)}], [{"good": np.ones(0), "a": np.ones(2)}])
    ).all()
    assert np.isnan(pictures_interval([], [])).all() and np.isnan(seed_interval([1.0])).all()


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_the_seed_interval_is_that_of_a_t_test(d):
    from scipy.stats import ttest_1samp

    low, high = seed_interval(d)
    assert low <= np.mean(d) + 1e-9 and np.mean(d) - 1e-9 <= high
    if np.std(d) > 1e-3:
        want = ttest_1samp(d, 0).confidence_interval()
        assert np.allclose([low, high], [want.low, want.high], atol=1e-6)


# tables


def made_up(strengths, seeds=(0, 1, 2), dataset="trays", noise=0.05, level=34):
    rng, rows = np.random.default_rng(5), []
    common = {
        "good": rng.normal(0, 1, 80),
        "logical_anomalies": rng.normal(0, 1, 80),
        "structural_anomalies": rng.normal(0, 1, 40),
    }
    for order, (name, strength) in enumerate(strengths.items()):
        for seed in seeds:
            scores = {k: v + (strength + noise * rng.normal()) * (k != "good") for k, v in common.items()}
            aurocs = [
                roc_auc_score(np.r_[np.zeros(80), np.ones(len(scores[k]))], np.r_[scores["good"], scores[k]])
                for k in scores
                if k != "good"
            ]
            rows.append(
                dict.fromkeys(METRICS, 90.0)
                | dict(zip(KEYS, ("demo", "", dataset, "x", level, name, seed)))
                | {
                    "order": order,
                    "image_auroc": 100 * np.mean(aurocs),
                    "image_auroc_mean": 100 * np.mean(aurocs),
                    "criterion": 10 * strength,
                    "ess_neg": 1.0,
                    "seconds": 1.0,
                    "scores": scores,
                }
            )
    return pd.DataFrame(rows)


def test_verdicts():
    table = compare(made_up({"base": 1.0, "better": 2.0, "worse": 0.3, "same": 1.0}, noise=0.02)).set_index("variant")
    assert dict(table.verdict) == {"base": "reference", "better": "gain", "worse": "loss", "same": "open"}
    assert (
        table.difference["better"] > 0 > table.difference["worse"]
        and table.seeds_low["better"] < table.difference["better"] < table.seeds_high["better"]
    )


def test_one_seed_decides_nothing():
    table = compare(made_up({"base": 1.0, "better": 3.0}, seeds=(0,))).set_index("variant")
    assert table.verdict["better"] == "open" and np.isnan(table.seeds_low["better"]) and table.test_low["better"] > 0


def test_pairs_are_the_seeds_that_both_have():
    found = made_up({"base": 1.0, "better": 2.0})
    fewer = found[~((found.variant == "base") & (found.seed == 2))]
    line = compare(fewer).set_index("variant").loc["better"]
    d = found[found.seed < 2].pivot(index="seed", columns="variant", values="image_auroc_mean")
    assert line.pairs == 2 and line.seeds == 3 and line.difference == pytest.approx((d.better - d.base).mean())


def test_the_reference_may_be_another_and_must_be_there():
    found = made_up({"base": 1.0, "better": 2.0})
    assert dict(compare(found, "better").set_index("variant").verdict) == {"base": "loss", "better": "reference"}
    with pytest.raises(ValueError, match="no results of 'best'"):
        compare(found, "best")


def test_levels_and_categories_are_kept_apart():
    both = pd.concat([made_up({"base": 1.0, "b": 2.0}), made_up({"base": 2.0, "b": 1.0}, level=68)])
    table = compare(both)
    assert (
        len(table) == 4
        and list(table.verdict) == ["reference", "gain", "reference", "loss"]
        and len(ablation_chart(both).axes) == 2
    )


def test_rank_correlation():
    found = made_up({"a": 0.5, "b": 1.0, "c": 1.5, "d": 2.0}, noise=0.0)
    ranks = rank_correlation(found).set_index(["chosen by", "test figure"])
    right = ranks.loc[("criterion", "image_auroc_mean")]
    assert (
        right.rho == pytest.approx(1)
        and right.regret == 0
        and right.chosen == "d"
        and right["by chance"] == pytest.approx(1 / np.sqrt(3))
    )
    assert np.isnan(ranks.loc[("selection_ap", "image_auroc_mean")].rho), "no differences, no ranks"
    wrong = (
        rank_correlation(found.assign(criterion=-found.criterion))
        .set_index(["chosen by", "test figure"])
        .loc[("criterion", "image_auroc_mean")]
    )
    assert wrong.rho == pytest.approx(-1) and wrong.chosen == "a" and wrong.regret > 5


def test_ranks_are_of_means_over_the_same_seeds():
    found = made_up({"a": 0.5, "b": 1.0, "c": 1.5, "d": 2.0}, noise=0.0)
    last = found.seed.max()
    easy = found.assign(image_auroc_mean=found.image_auroc_mean.where(found.seed < last, 100.0))
    unfinished = easy[~((easy.seed == last) & (easy.variant != "a"))]  # only "a" has the seed that is easy for all
    assert set(common_seeds(unfinished).seed) == set(found.seed) - {last} and len(common_seeds(easy)) == len(easy)
    rho = lambda x: rank_correlation(x).set_index(["chosen by", "test figure"]).rho[("criterion", "image_auroc_mean")]
    assert rho(unfinished) == pytest.approx(1)
    apart = easy[(easy.variant == "a") == (easy.seed == last)]  # no seed in common: all are used
    assert len(common_seeds(apart)) == len(apart)


def test_chart_ends_where_its_points_do():
    found = made_up({"base": 1.0, "better": 2.0})
    found = found[found.seed < 2]
    table, ax = compare(found), ablation_chart(found).axes[0]
    low, high = ax.get_xlim()
    assert low < table.test_low.min() and high > table.test_high.max() and high - low < 100, (
        "an interval over two seeds does not decide the axis"
    )


def test_chart_shows_every_variant_with_its_figure(done):
    found = made_up({"base": 1.0, "better": 2.0})
    figure = ablation_chart(found)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert [t.split("  ")[0] for t in labels] == ["base", "better"] and labels[0].endswith(
        f"{found.image_auroc_mean[:3].mean():.1f}"
    )
    plt.close("all")
    ablation_chart(read_results(done[1] / "ablation"))
    curve_chart(read_results(done[1] / "ablation"), "rbce")
    plt.close("all")


def test_table_4_is_fed(done):
    found = read_results(done[1] / "ablation")
    figures = table_4_figures(found, read_results(done[1] / "ablation", "trivial"))
    assert list(figures.columns) == list(collect(done[1] / "nothing").columns)
    table = table_4(figures, categories=["trays"], dataset="trays")
    for name in TWO:
        assert table.loc[name, "level 34 here"].startswith(
            f"{found[found.variant == name].image_auroc_mean.mean():.1f} ±"
        )
    assert table.loc["+ Regularization", "level 34 here"] == "-" and table.loc[
        "nearest picture", "level 34 here"
    ] not in ("-", "n/a")
    assert any("learnt from 6 pictures, 2 were held out" in note for note in table.attrs["notes"])


# what is kept


def test_collected_records_hold_no_picture_and_give_the_same_tables(done, tmp_path):
    _, root, _ = done
    files = collect_results(root / "ablation", tmp_path / "results")
    assert {p.suffix for p in (tmp_path / "results").rglob("*") if p.is_file()} == {
        ".json",
        ".csv",
        ".md",
        ".tex",
    } and all(p.is_file() for p in files)
    assert max(p.stat().st_size for p in files) < 20_000 and not any(str(root) in p.read_text() for p in files), (
        "small, and no path of this machine"
    )
    assert {n: t.to_csv() for n, t in tables_of(root / "ablation").items()} == {
        n: t.to_csv() for n, t in tables_of(tmp_path / "results").items()
    }
    first = {p: p.read_bytes() for p in files}
    collect_results(root / "ablation", tmp_path / "results")
    assert first == {p: p.read_bytes() for p in files}, "collecting twice changes nothing"


def test_records_of_ablations_are_collected_with_their_tables(done, tmp_path):
    source = done[1] / "ablation"
    files = collect_folder(source, tmp_path)
    records = sorted(path.relative_to(source) for path in source.rglob("level-*.json"))
    kept = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("level-*.json"))
    assert records == kept and len(files) > len(records)
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == to_markdown(tables_of(tmp_path)["ablation"])


def test_damaged_and_doubled_records_are_named(done, tmp_path):
    path = next((done[1] / "ablation").rglob("level-034.json"))
    record = read_json(path)
    write_json(tmp_path / "a.json", record)
    write_json(tmp_path / "b.json", record)
    with pytest.raises(ValueError, match="a.json and .*b.json are of the same training"):
        read_results(tmp_path)
    write_json(tmp_path / "b.json", {k: v for k, v in record.items() if k != "scores"})
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="b.json is not a whole record"):
        read_results(tmp_path)
    assert read_results(tmp_path, "generator").empty


# generators


def test_generators_are_judged_without_a_test_picture(data, tmp_path, monkeypatch):
    import grad_nb.study.ablation as room

    loaded = []
    real = room.load_images
    monkeypatch.setattr(room, "load_images", lambda samples, *rest: loaded.append(samples) or real(samples, *rest))
    drawn = opened(
        data, tmp_path, {"sigma_g 0": {"generator.sigma_g": 0}, "sigma_g 1": {"generator.sigma_g": 1}}, seeds=(0,)
    )
    assert drawn.part == "generator" and len(pieces(drawn)) == 2 * 3
    run_pieces([p for p in pieces(drawn) if "level 3," in p.name], lambda line: None)
    found = read_results(tmp_path / "ablation", "generator")
    assert not loaded and list(found.variant) == ["sigma_g 0", "sigma_g 1"]
    assert found["two-sample AUROC at n"].isna().all(), "too few pictures to say"
    losses = [r["loss"] for r in found.record]
    assert losses[0] != losses[1] and found.record[1]["config"]["generator"]["sigma_g"] == 1
    assert len(compare_generators(found)) == 2 and list(tables_of(tmp_path / "ablation")) == ["generators"]
    sheets = picture_sheets(drawn, 3)
    assert list(sheets) == [3] and len(sheets[3].axes) == 3 * 3, (
        "real pictures and two variants, of the level that is done"
    )
    curve_chart(found)
    shorter = [{name: values[:1] for name, values in record["curve"].items()} for record in found.record]
    short = [record | {"curve": curve} for record, curve in zip(found.record, shorter)]
    both = pd.concat([found, found.assign(preset="fast", record=short)])
    assert compare_generators(both).groupby("preset", sort=False).seeds.apply(list).to_dict() == {
        found.preset[0]: [1, 1],
        "fast": [1, 1],
    }, "presets are not seeds of each other"
    labels = [text.get_text() for text in curve_chart(both).axes[-1].get_legend().get_texts()]
    assert labels == [f"{name}, sigma_g {k}" for name in (found.preset[0], "fast") for k in (0, 1)]
    plt.close("all")


def test_loss_curve_keeps_the_mean():
    history = pd.DataFrame({"loss": np.random.default_rng(0).random(90)})
    curve = loss_curve(history, 30)
    assert (
        len(curve["step"]) == 30
        and np.mean(curve["loss"]) == pytest.approx(history.loss.mean())
        and curve["step"][0] == 1
    )


# command and template


def test_command(done, data, tmp_path, capsys):
    _, root, _ = done
    grad_ablate(
        data=str(data),
        variants=json.dumps(TWO),
        seeds=(0, 1),
        overrides=TINY,
        selection="per_kind=3 share=0.3",
        runs=str(root / "runs"),
        folder=str(root / "ablation"),
        device="cpu",
        quiet=True,
    )
    assert "pieces are there already" in capsys.readouterr().out
    grad_ablate(folder=str(root / "ablation"), collect=str(tmp_path / "kept"))
    assert "files in" in capsys.readouterr().out and (tmp_path / "kept/ablation.md").is_file()
    with pytest.raises(SystemExit):
        grad_ablate(category="bottle")
    assert "needs --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grad_ablate(data=str(data), seeds=(1, 1), folder=str(tmp_path))
    assert "each once" in capsys.readouterr().err


def test_template_has_the_commands_parameters():
    import inspect

    from grad_nb.runs.driver import template, template_parameters

    parameters = template_parameters(template("ablation"))
    assert {
        "data",
        "category",
        "preset",
        "seeds",
        "variants",
        "overrides",
        "runs",
        "folder",
        "device",
        "threads",
    } <= set(parameters)
    asked = inspect.signature(open_ablation).parameters
    assert {k: v for k, v in parameters.items() if k in asked and k not in ("data", "category", "seeds")} == {
        k: asked[k].default for k in parameters if k in asked and k not in ("data", "category", "seeds")
    }


@pytest.mark.slow
def test_template_runs(done, data, tmp_path):
    _, root, _ = done
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "nbs/reproduce/ablation.ipynb"),
        str(tmp_path / "out.ipynb"),
        "-k",
        "python3",
        "-r",
        "data",
        str(data),
        "-r",
        "variants",
        json.dumps(TWO),
        "-y",
        "seeds: [0, 1]",
        "-r",
        "overrides",
        TINY,
        "-r",
        "selection",
        "per_kind=3 share=0.3",
        "-r",
        "runs",
        str(root / "runs"),
        "-r",
        "folder",
        str(root / "ablation"),
        "-r",
        "device",
        "cpu",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert "are there already" in (tmp_path / "out.ipynb").read_text()
