"""What is kept: every folder of results is a question, every record can be read, and the page says what they say."""

import json
from pathlib import Path

import pytest
from shared import ROOT

from grad_nb.config import PRESETS, to_dict
from grad_nb.core.files import read_json, write_json
from grad_nb.study.ablation import GENERATOR_COLUMNS, METRICS, compare, compare_generators, read_results, tables_of
from grad_nb.study.records import GONE, RENAMED_FIGURES, current_config, gone_settings, recorded_preset
from grad_nb.study.results import collect_folder, collect_sets, grad_collect, read_sets, readme
from grad_nb.study.tables import collect, to_markdown

RESULTS = ROOT / "results"
RECORDS = sorted(path for path in RESULTS.rglob("*.json") if path != RESULTS / "sets.json")
SETS = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
TABLES = sorted({path.parent for name in ("ablation.md", "generators.md") for path in RESULTS.rglob(name)})


def kind_of(record: dict) -> str:
    "Which kind of record a file holds."
    return record.get("kind", "result")


# what there is


def test_every_folder_is_a_set_and_every_set_has_a_folder_with_records():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    sets = read_sets(RESULTS)
    assert {made.folder for made in sets} == folders
    for made in sets:
        assert made.question and made.commands and made.added and made.date, made.folder
        assert any((RESULTS / made.folder).rglob("*.json")), made.folder


def test_the_page_is_what_the_sets_and_their_records_say():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert page == readme(RESULTS), "run  python -m grad_nb.study.results --page"
    configs = [record["config"] for record in map(read_json, RECORDS) if "config" in record]
    for name, value in {item for config in configs for item in gone_settings(config).items()}:
        assert f"`{name}={value}`" in page


@pytest.mark.parametrize("folder", SETS)
def test_every_record_is_read_whatever_its_age(folder):
    for path in sorted((RESULTS / folder).rglob("*.json")):
        record = read_json(path)
        kind = kind_of(record)
        if kind == "result":
            found = collect(path.parent)
            said = found.notes.str.contains("no ground truth")  # then there are no pixel figures
            assert (found.value.notna() | said).all() and set(found.seed) == {record["seed"]}, path
        else:
            found = read_results(path.parent, kind)
            assert record["category"] in set(found["category"]), path
        if kind == "generator":
            assert set(GENERATOR_COLUMNS) - {"loss"} <= set(found.columns), path


@pytest.mark.parametrize("folder", SETS)
def test_the_settings_of_every_record_are_known_or_gone(folder):
    for path in sorted((RESULTS / folder).rglob("*.json")):
        record = read_json(path)
        if "config" not in record:
            continue
        gone = gone_settings(record["config"])
        if not gone:
            assert recorded_preset(record["config"]).name == record["preset"], path
        now = current_config(record["config"])
        kept = {f"{part}.{name}" for part, name in GONE if name in now[part]}
        assert kept == set(gone), f"{path}: a setting that is gone stays only where it acted"


@pytest.mark.parametrize("folder", TABLES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_tables_are_what_their_records_say(folder):
    for name, table in tables_of(folder).items():
        assert (folder / f"{name}.md").read_text(encoding="utf-8") == to_markdown(table)


# names and settings of 0.1.0


def test_old_columns_have_their_names_of_today(tmp_path):
    path = next(path for path in RECORDS if kind_of(read_json(path)) == "generator")
    record = read_json(path)
    assert set(RENAMED_FIGURES) <= set(record["report"]), "records are not rewritten"
    write_json(tmp_path / "old.json", record)
    report = {RENAMED_FIGURES.get(name, name): value for name, value in record["report"].items()}
    write_json(tmp_path / "new.json", record | {"seed": 99, "report": report})
    old, new = read_results(tmp_path, "generator").sort_values("seed").to_dict("records")
    assert all(old[name] == new[name] == record["report"][was] for was, name in RENAMED_FIGURES.items())
    assert compare_generators(read_results(tmp_path, "generator"))["seeds"].item() == 2


def test_a_setting_that_is_gone_counts_only_where_it_acted():
    config = to_dict(PRESETS["demo"])
    for (part, name), nothing in GONE.items():
        config[part][name] = nothing
    assert recorded_preset(config) == PRESETS["demo"] and not gone_settings(config)
    config["detector"]["shared_pass"] = True
    assert gone_settings(config) == {"detector.shared_pass": True}
    assert current_config(config)["detector"]["shared_pass"] is True


def test_variants_of_settings_that_are_gone_are_compared_as_all_others():
    found = read_results(RESULTS / "open-values")
    gone = {"ess_target 0.5", "reweight_from 0.5", "ema 0.99"}
    table = compare(found).set_index("variant")
    assert gone <= set(table.index) and table.loc[sorted(gone), ["image", "difference"]].notna().all().all()
    assert found[list(METRICS)].notna().all().all()


# collecting


def made_up_sets(folder: Path, *entries: dict) -> Path:
    "A folder of results with these sets and no records."
    about = {"question": "Is it so?", "commands": ["make demo"], "added": ["abc"], "date": "today"}
    write_json(folder / "sets.json", [about | entry for entry in entries])
    return folder


def result_of(folder: Path, seed: int = 0) -> Path:
    "A result.json with no figures."
    path = folder / f"demo/trays/trays/seed{seed}/result.json"
    versions = {"grad_nb": "0.2.0"}
    record = {"preset": "demo", "seed": seed, "device": "cpu", "versions": versions}
    write_json(path, record | {"config": to_dict(PRESETS["demo"])})
    return path


def test_what_is_there_is_collected_into_its_set(tmp_path):
    results = made_up_sets(
        tmp_path / "results",
        {"folder": "as-it-is", "sources": {"runs": ""}},
        {"folder": "is-it-faster"},
        {"folder": "in-parts", "sources": {"first": "one", "second": "two"}},
        {"folder": "not-run"},
    )
    kept = result_of(tmp_path / "elsewhere").read_bytes()
    result_of(tmp_path / "is-it-faster", 1)
    result_of(tmp_path / "second/200-steps", 2)
    (tmp_path / "elsewhere/demo/trays/trays/seed0/maps.png").write_bytes(b"x")
    found = collect_sets(results, tmp_path, tmp_path / "elsewhere")
    assert list(found) == ["as-it-is", "is-it-faster", "in-parts"]
    assert (results / "as-it-is/demo/trays/trays/seed0/result.json").read_bytes() == kept
    assert (results / "in-parts/two/200-steps/demo/trays/trays/seed2/result.json").is_file()
    assert not list(results.rglob("*.png")) and not (results / "not-run").exists()


def test_records_of_ablations_are_collected_with_their_tables(tmp_path):
    source = RESULTS / "bottle-without-level-17"
    files = collect_folder(source, tmp_path)
    records = sorted(path.relative_to(source) for path in source.rglob("*.json"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")) == records
    assert (tmp_path / "ablation.md").read_bytes() == (source / "ablation.md").read_bytes() and len(files) > len(
        records
    )


def test_the_command(tmp_path, capsys):
    results = made_up_sets(tmp_path / "results", {"folder": "is-it-faster"})
    result_of(tmp_path / "is-it-faster")
    grad_collect(here=str(tmp_path), results=str(results))
    assert "is-it-faster: 1 files" in capsys.readouterr().out
    page = (results / "README.md").read_text()
    assert "## is-it-faster" in page and "records: 1, seeds 0" in page and "device: cpu" in page
    grad_collect(here=str(tmp_path), results=str(results), page=True)
    assert (results / "README.md").read_text() == page


@pytest.mark.parametrize(
    "entries, said",
    [
        ([{"folder": "a"}, {"folder": "a"}], "names a twice"),
        ([{"folder": "a", "colour": "red"}], "entry 1, is not a set"),
        ([{}], "entry 1, is not a set"),
    ],
)
def test_sets_that_cannot_be_are_named(tmp_path, entries, said):
    with pytest.raises(ValueError, match=said):
        read_sets(made_up_sets(tmp_path, *entries))


def test_make_collect_reads_the_sets_from_one_place():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("collect:")[1].split("clean:")[0]
    assert "grad_nb.study.results" in recipe
    assert not any(made.folder in recipe for made in read_sets(RESULTS))
    assert json.loads((RESULTS / "sets.json").read_text(encoding="utf-8"))
