"""Losses beside DPO's line of win rate against KL."""

from pathlib import Path

import numpy as np
import pytest

from jaxrepro import files
from jaxrepro.config import UserError
from jaxrepro.methods.dpo import frontier


def measured(changes, seeds=3):
    """Results in which every arm lies on win = 1/2 + sqrt(KL) / 10, but for `changes` of the win rate."""
    arms = {}
    for i, name in enumerate((*frontier.LINE, *frontier.LOSSES)):
        kls = [1.0 + i % len(frontier.LINE) + 0.1 * s for s in range(seeds)]
        wins = [0.5 + np.sqrt(kl) / 10 + changes.get(name, 0.0) for kl in kls]
        found = zip(kls, wins, strict=True)
        arms[name] = {
            "per_seed": {
                str(s): {frontier.KL: kl, frontier.WIN: win, frontier.LENGTH: 5.0}
                for s, (kl, win) in enumerate(found)
            }
        }
    return {"arms": arms, "seeds": list(range(seeds))}


def test_a_loss_on_the_line_is_not_above_it_and_what_is_above_is_measured_at_its_own_kl():
    found = {row.name: row for row in frontier.rows(measured({"simpo": 0.05, "ipo": -0.02}))}
    assert found["simpo"].above.mean == pytest.approx(0.05)
    assert found["ipo"].above.mean == pytest.approx(-0.02)
    assert found["hinge"].above.mean == pytest.approx(0.0, abs=1e-12)
    assert found["sigmoid"].above is None
    assert list(found)[len(frontier.LINE)] == "simpo" and list(found)[-1] == "ipo"


def test_the_line_starts_at_a_half_is_straight_in_the_root_and_level_beyond_its_end():
    line = [(4.0, 0.9), (1.0, 0.7)]
    assert frontier.level(0.0, line) == 0.5
    assert frontier.level(0.25, line) == pytest.approx(0.6)  # half of sqrt(1)
    assert frontier.level(2.25, line) == pytest.approx(0.8)
    assert frontier.level(9.0, line) == pytest.approx(0.9)


def test_what_moved_further_than_the_line_says_so():
    data = measured({})
    data["arms"]["orpo"]["per_seed"]["1"][frontier.KL] = 50.0
    text = frontier.table(frontier.rows(data), 3)
    (line,) = [line for line in text.splitlines() if "`orpo`" in line]
    assert "further than the line in 1 of 3 seeds" in line
    assert text.count("further") == 1 and text.count("the line |") == len(frontier.LINE)


def test_the_command_prints_draws_and_names_what_lacks(tmp_path, capsys):
    data = measured({})
    files.write_json(tmp_path / "r.json", data)
    assert frontier.main([f"--results={tmp_path}/r.json", f"--picture={tmp_path}/p.png"]) == 0
    assert "| `simpo` |" in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    data["arms"]["ipo"]["per_seed"]["2"] = {"error": "it was killed"}
    assert frontier.seeds_of(data) == ["0", "1"] and len(frontier.rows(data)) == 13
    data["arms"]["ipo"]["per_seed"] = {"0": {"error": "it was killed"}}
    with pytest.raises(UserError, match="no seed has finished"):
        frontier.rows(data)
    files.write_json(tmp_path / "list.json", [1])
    assert frontier.main([f"--results={tmp_path}/list.json"]) == 2
    assert "no results of a study" in capsys.readouterr().err
    del data["arms"]["simpo"]
    files.write_json(tmp_path / "r.json", data)
    assert frontier.main([f"--results={tmp_path}/r.json"]) == 2
    assert "lack the arms simpo" in capsys.readouterr().err


def test_the_readmes_table_is_that_of_the_results():
    data = files.read_json(frontier.FILE)
    readme = Path(frontier.__file__).with_name("README.md").read_text()
    assert frontier.table(frontier.rows(data), len(frontier.seeds_of(data))) in readme
