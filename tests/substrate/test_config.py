"""Config files, sizes, overrides, and their one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxrepro import config as configuration
from jaxrepro.config import UserError, diff, fingerprint, from_json, load, take_config, to_json

FAKE = str(Path(__file__).parent / "fixtures" / "fake.py")
KEYS = sorted(configuration.flatten(load(FAKE)))


def error(*overrides: str, spec: str = FAKE) -> str:
    """The one line that a bad override gives."""
    with pytest.raises(UserError) as caught:
        load(spec, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rl.lr=1", "rl.lr", 1.0),
        ("--config.rl.lr=1e-5", "rl.lr", 1e-5),
        ("seed=1_000", "seed", 1000),
        ("limit=-1", "limit", -1),
        ("shuffle=false", "shuffle", False),
        ("shuffle=0", "shuffle", False),
        ("--noconfig.shuffle", "shuffle", False),
        ("betas=0.5,1", "betas", (0.5, 1.0)),
        ("betas=(0.5, 0.6, 0.7)", "betas", (0.5, 0.6, 0.7)),
        ("widths=[4,4]", "widths", (4, 4)),
        ("widths=4", "widths", (4,)),
        ("rewards=x:y,z:w", "rewards", ("x:y", "z:w")),
        ("rewards=('x:y','z:w')", "rewards", ("x:y", "z:w")),
        ("rewards=x:y", "rewards", ("x:y",)),
        ("name=a=b, c", "name", "a=b, c"),
        ("name=", "name", ""),
        ("limit=3", "limit", 3),
    ],
)
def test_an_override_takes_the_type_of_its_field(override, key, value):
    found = configuration.flatten(load(FAKE, [override]))[key]
    assert found == value and type(found) is type(value)


def test_mapping_list_and_command_line_share_one_path():
    mapping = {"rl.lr": 0.5, "betas": (0.5, 0.6), "shuffle": False, "rewards": ("q:r",)}
    texts = ["rl.lr=0.5", "betas=0.5,0.6", "shuffle=false", "rewards=q:r"]
    words = ["--config.rl.lr", "0.5", "--noconfig.shuffle", f"--config={FAKE}"]
    words += ["--config.betas=0.5,0.6", "--config.rewards=q:r"]
    nested = {"rl": {"lr": 0.5}, "betas": (0.5, 0.6), "shuffle": False, "rewards": ("q:r",)}
    prints = {fingerprint(load(FAKE, o)) for o in (mapping, texts, nested)}
    chosen = take_config(words)
    assert prints == {fingerprint(chosen.config)} and chosen.size == "tiny" and not chosen.rest


def test_none_in_a_mapping_leaves_the_field_alone():
    assert not diff(load(FAKE, {"limit": None, "seed": None}), load(FAKE))


def test_resolve_fills_only_what_the_user_left_untouched():
    assert load(FAKE).gate == "paper"
    assert load(FAKE, ["preset=official"]).gate == "code"
    assert load(FAKE, ["preset=official", "gate=own"]).gate == "own"


def test_the_size_reaches_get_config():
    assert load(FAKE + ":large").mesh.data == 256
    assert take_config([f"--config={FAKE}:large"]).size == "large"


def test_a_config_is_locked():
    with pytest.raises((AttributeError, KeyError)):
        load(FAKE).new = 1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rl.lrr=1", ["config.rl.lrr", "did you mean config.rl.lr?"]),
        ("lr=1", ["config.lr", "config.rl.lr or config.sft.lr"]),
        ("stpes=1", ["did you mean config.steps?"]),
        ("rl=1", ["config.rl is a section", "rl.batch, rl.lr"]),
        ("seed.x=1", ["unknown key config.seed.x"]),
        ("items=1", ["unknown key config.items"]),  # an attribute of ConfigDict, not a field
        ("seed=1e3", ["config.seed=1e3", "int", "write 1000"]),
        ("seed=2.5", ["config.seed=2.5", "int"]),
        ("seed=", ["config.seed=", "int"]),
        ("seed=99999999999999999999", ["config.seed=99999999999999999999", "0 to 4294967295"]),
        ("seed=4294967296", ["config.seed=4294967296", "0 to 4294967295"]),
        ("seed=-1", ["config.seed=-1", "0 to 4294967295"]),
        ("rl.lr=fast", ["config.rl.lr=fast", "float"]),
        ("shuffle=yes", ["config.shuffle=yes", "true or false"]),
        ("limit=x", ["config.limit=x", "int"]),
        ("betas=a,b", ["config.betas=a,b", "float", "0.9,0.99"]),
        ("widths=1.5", ["config.widths=1.5", "int"]),
        ("--noconfig.seed", ["only a bool"]),
        ("--config.seed", ["needs a value"]),
        ("preset=papr", ["config.preset=papr", "paper, official"]),
        ("--seed=3", ["not an override", "--seed=3"]),
    ],
)
def test_a_bad_override_says_value_limit_and_remedy(override, parts):
    line = error(override)
    assert all(part in line for part in parts), line


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KEYS), st.data())
def test_a_misspelt_key_is_one_line_that_names_it(key, data):
    position = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("abcxyz_."))
    kind = data.draw(st.sampled_from(["drop", "double", "replace", "insert"]))
    middle = {"drop": "", "double": key[position] * 2, "replace": letter}.get(
        kind, letter + key[position]
    )
    wrong = key[:position] + middle + key[position + 1 :]
    if wrong in KEYS:
        return
    line = error(f"{wrong}=1")
    assert f"config.{wrong}" in line


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([k for k in KEYS if k not in ("method", "gate")]), st.text(max_size=12))
def test_any_text_is_taken_or_refused_in_one_line(key, text):
    try:
        load(FAKE, [f"{key}={text}"])
    except UserError as e:
        assert "\n" not in str(e).replace(text, "")


def test_missing_file_names_the_place_of_configs():
    line = error(spec="configs/nope.py")
    assert "configs/nope.py" in line and "clone" in line
    assert "''" in error(spec="")


def test_unknown_size_lists_the_sizes():
    line = error(spec=FAKE + ":huge")
    assert "'huge'" in line and "tiny, large" in line


def test_resolve_and_get_config_fail_in_one_line(tmp_path):
    assert "rl.batch=8 is not a multiple" in error("mesh.data=3")
    path = tmp_path / "broken.py"
    for text, part in [
        ("import no_such_package", "broken.py:1: ModuleNotFoundError"),
        ("x = (", "broken.py:1: SyntaxError"),
        ("def get_config(size='a'):\n    return undefined", "broken.py:2: NameError"),
        ("def get_config(size='a'):\n    raise ValueError('size a\\nis odd')", "is odd"),
        ("def get_config(size='a'):\n    return 3", "not a ConfigDict"),
        ("x = 1", "get_config"),
    ]:
        path.write_text(text + "\n")
        assert part in error(spec=str(path))


def test_a_list_in_a_config_is_refused(tmp_path):
    path = tmp_path / "lists.py"
    path.write_text(
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'x': [1]})\n"
    )
    assert "make it a tuple" in error(spec=str(path))


def test_overrides_without_a_config_are_refused():
    with pytest.raises(UserError, match="--config="):
        take_config(["--config.seed=1"])
    assert take_config(["--list"]) == (None, None, ["--list"])


def test_json_round_trip_keeps_every_field():
    config = load(FAKE, ["betas=0.1,0.2"])
    again = from_json(to_json(config))
    assert not diff(config, again) and again.betas == (0.1, 0.2) and again.rl.lr == 1e-3
    assert fingerprint(config) == fingerprint(again)


def test_a_foreign_config_json_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "[]", "{}", '{"config": 3}', "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            configuration.saved(path)
    path.write_text(json.dumps({"config": {"method": "fake"}}))
    assert configuration.saved(path).method == "fake"


def test_diff_names_dotted_keys():
    a = load(FAKE)
    assert diff(a, load(FAKE, ["rl.lr=2", "betas=1,2"])) == ["betas", "rl.lr"]
    assert diff({"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": None}}) == ["a", "b.d"]
    assert diff({"a": True}, {"a": 1}) == ["a"]


def test_fingerprint_ignores_order_and_named_keys_only():
    a = ConfigDict({"x": 1, "every": {"a": 2}, "path": "p"})
    assert fingerprint(a) == fingerprint({"path": "p", "every": {"a": 2}, "x": 1})
    assert fingerprint(a) != fingerprint({"path": "p", "every": {"a": 3}, "x": 1})
    assert fingerprint(a, ["every.*", "path"]) == fingerprint({"x": 1})
    assert fingerprint({"x": 1, "later": None}) == fingerprint({"x": 1})
    assert fingerprint({"x": 1}) == "5041bf1f713df204"  # sha256 of {"x":1}: must not change


def test_config_files_import_without_jax():
    code = "import sys\nfrom jaxrepro import cli, config, evaluate, launch, sample\n"
    code += f"for f in [{FAKE!r}, *map(str, config.files())]:\n    config.load(f)\n"
    code += "print(*[m for m in ('jax', 'flax', 'numpy', 'transformers') if m in sys.modules])"
    root = Path(configuration.ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
