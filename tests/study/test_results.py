"""What is kept: every folder of results is a question, every record can be read, and the page says what they say."""

import json
from pathlib import Path

import pytest
from shared import ROOT

from grad_nb.config import PRESETS, to_dict
from grad_nb.core.files import read_json, write_json
from grad_nb.study.records import GONE, RENAMED_SETTINGS, current_config, recorded_preset
from grad_nb.study.results import collect_sets, grad_collect, read_sets, readme
from grad_nb.study.tables import collect

RESULTS = ROOT / "results"
SETS = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


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


@pytest.mark.parametrize("folder", SETS)
def test_every_record_is_read_whatever_its_age(folder):
    for path in sorted((RESULTS / folder).rglob("*.json")):
        record = read_json(path)
        found = collect(path.parent)
        found = found[found.file == str(path)]
        said = found.notes.str.contains("no ground truth")  # then there are no pixel figures
        assert len(found) and (found.value.notna() | said).all() and set(found.seed) == {record["seed"]}, path


@pytest.mark.parametrize("folder", SETS)
def test_the_settings_of_every_record_are_known(folder):
    for path in sorted((RESULTS / folder).rglob("*.json")):
        record = read_json(path)
        assert recorded_preset(record["config"]).name == record["preset"], path


# names and settings of 0.1.0


def test_a_setting_that_is_renamed_is_read_under_its_name_of_today():
    config = to_dict(PRESETS["demo"])
    for (part, name), now in RENAMED_SETTINGS.items():
        config[part][name] = config[part].pop(now)
    assert recorded_preset(config) == PRESETS["demo"]


def test_a_setting_that_is_gone_counts_only_where_it_acted():
    config = to_dict(PRESETS["demo"])
    for (part, name), nothing in GONE.items():
        config[part][name] = nothing
    assert recorded_preset(config) == PRESETS["demo"]
    config["detector"]["shared_pass"] = True
    assert current_config(config)["detector"]["shared_pass"] is True
    with pytest.raises(ValueError, match="shared_pass"):
        recorded_preset(config)


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
