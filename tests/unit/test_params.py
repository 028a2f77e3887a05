# SPDX-License-Identifier: Apache-2.0
"""params.yaml: what is wrong is one line that names the key."""

import copy
import re

import pytest
import yaml

from panda_ad.errors import UserError
from panda_ad.params_file import load_params, parse_params


@pytest.fixture
def raw(repo_root):
    return yaml.safe_load((repo_root / "params.yaml").read_text())


def test_the_projects_own_parameters_load(repo_root):
    params = load_params(repo_root / "params.yaml")
    assert params.backbone.size[0] >= 16
    assert params.categories


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("adapt", "epochz", 3, "adapt.epochz: unknown key"),
        ("adapt", "epochs", "ten", "adapt.epochs: "),
        ("adapt", "epochs", 0, "adapt.epochs: "),
        ("adapt", "method", "magic", "adapt.method: "),
        ("adapt", "learning_rate", -1.0, "adapt.learning_rate: "),
        ("backbone", "input_size", 8, "backbone.input_size: "),
        ("backbone", "input_size", [64], "backbone.input_size: "),
        ("data", "calibration_fraction", 1.0, "data.calibration_fraction: "),
        ("gallery", "k", True, "gallery.k: "),
        ("localize", "tiles", 1, "localize.tiles: "),
        ("localize", "tiles", 9, "localize.tiles: "),
        ("localize", "tiles", [2, 3], "localize.tiles: "),
        ("verdict", "false_alarm_rate", 0.0, "verdict.false_alarm_rate: "),
    ],
)
def test_a_bad_value_is_one_line_naming_its_key(raw, section, key, value, said):
    raw = copy.deepcopy(raw)
    raw[section][key] = value
    with pytest.raises(UserError) as e:
        parse_params(raw)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name",
    [
        "data",
        "seconds",
        "",
        " a",
        "a/b",
        "a@b",
        "../up",
        'say "hi"',
        ".hidden",
        "-x",
        "US$5",
        "a`id`",
        "x.dvc",
        "X.DVC",
        "a\nb",
        "a#b",
    ],
)
def test_names_that_cannot_be_folders_stages_or_words_of_a_shell_are_refused(raw, name):
    with pytest.raises(UserError, match="categories: .* cannot name a category: ") as e:
        parse_params({**raw, "categories": [name]})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("one", "other"), [("bolt 6.5", "bolt 6_5"), ("Nut", "nut"), ("geh\u00e4use", "geha\u0308use")]
)
def test_two_categories_that_would_share_a_name_are_refused(raw, one, other):
    with pytest.raises(UserError, match="would share one name"):
        parse_params({**raw, "categories": [one, other]})
    assert parse_params({**raw, "categories": [one]}).categories == [one]


@pytest.mark.parametrize("name", ["metal nut (v2)", "bolt 6.5", "gehäuse", "a+b, c;d & e~f"])
def test_other_names_are_fine(raw, name):
    assert parse_params({**raw, "categories": [name]}).categories == [name]


def test_missing_keys_repeats_and_other_shapes(raw):
    less = {k: v for k, v in raw.items() if k != "seed"}
    with pytest.raises(UserError, match="seed: missing"):
        parse_params(less)
    with pytest.raises(UserError, match="twice"):
        parse_params({**raw, "categories": ["a", "a"]})
    with pytest.raises(UserError, match="mapping"):
        parse_params(["a list"])
    raw["adapt"]["method"] = "oe"
    with pytest.raises(UserError, match="adapt.outliers"):
        parse_params(raw)


@pytest.mark.parametrize(("key", "line"), [("seed", "seed: 1\n"), ("data", "data: {root: elsewhere}\n")])
def test_a_key_that_stands_twice_is_refused(tmp_path, repo_root, key, line):
    """PyYAML would take the last one in silence."""
    path = tmp_path / "params.yaml"
    path.write_text((repo_root / "params.yaml").read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(UserError, match=f"the key '{key}' stands twice"):
        load_params(path)


def test_parameters_are_read_as_dvc_reads_them(tmp_path, raw):
    """YAML 1.2: `dvc exp run -S adapt.weight_decay=1e-5` writes 1e-05, which YAML 1.1 takes for text, and `no` for false."""
    from dvc.utils.serialize import parse_yaml

    raw["adapt"]["weight_decay"] = "WEIGHT"
    text = yaml.safe_dump(raw).replace("WEIGHT", "1e-05").replace("seed: 0", "seed: 010")
    text = re.sub(r"categories:\n(- .*\n)+", "categories: [no, on, y]\n", text)
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    params, theirs = load_params(path), parse_yaml(text, str(path))
    assert params.categories == theirs["categories"] == ["no", "on", "y"]
    assert params.adapt.weight_decay == theirs["adapt"]["weight_decay"] == 1e-5
    assert params.seed == theirs["seed"] == 10


def test_a_number_out_of_range_is_not_told_to_be_a_list(raw):
    raw["backbone"]["input_size"] = 3
    with pytest.raises(
        UserError, match=r"^[^;]*backbone.input_size: Input should be greater than or equal to 16, found 3$"
    ):
        parse_params(raw)
    with pytest.raises(UserError, match="categories: Input should be a valid list, found 'fabric'"):
        parse_params({**raw, "categories": "fabric"})


def test_tiles_go_with_the_patch_memory_only(raw):
    raw["localize"] |= {"method": "patch_memory", "tiles": 3}
    assert parse_params(raw).localize.tiles == 3
    for method in ("spade", "none"):
        raw["localize"]["method"] = method
        with pytest.raises(UserError, match=f"localize: tiles need method: patch_memory, not {method}"):
            parse_params(raw)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_params(tmp_path / "bad.yaml")


@pytest.mark.parametrize(("name", "read"), [("true", "True"), ("007", "7"), ("null", "None")])
def test_a_name_that_yaml_reads_as_something_else_wants_quotes(tmp_path, repo_root, name, read):
    text = (repo_root / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("categories: [fabric, grid, capsule]", f"categories: [{name}]"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"categories.0: .* found {read}.*put it in quotes"):
        load_params(file)
    file.write_text(text.replace("categories: [fabric, grid, capsule]", f"categories: ['{name}']"), encoding="utf-8")
    assert load_params(file).categories == [name]
