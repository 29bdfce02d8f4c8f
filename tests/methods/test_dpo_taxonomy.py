"""The survey's taxonomy as data: unique entries, ids, names that clash kept apart, keys that exist, a listing."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from jaxrepro.config import ROOT, UserError
from jaxrepro.methods.dpo import taxonomy
from jaxrepro.methods.dpo.registry import REGISTRY

ENTRIES = [
    (category, sub, found)
    for category, subs in taxonomy.load().items()
    for sub, found in subs.items()
]
# Names that several papers share, and how many (the name alone must not find a method).
SHARED = {"GDPO": 2, "GPO": 2, "SPO": 3, "CPO": 3, "APO": 2, "D2PO": 2, "TPO": 2, "RPO": 2, "MPO": 2, "ADPO": 2}  # fmt: skip


@pytest.mark.parametrize(("category", "sub", "found"), ENTRIES)
def test_a_subcategory_holds_a_method_once(category, sub, found):
    assert found
    assert max(Counter((m.name, m.arxiv) for m in found).values()) == 1
    assert len({m.label for m in found}) == len(found)


def test_every_id_looks_like_arxivs_and_every_tag_is_known():
    for m in taxonomy.methods().values():
        assert m.arxiv is None or re.fullmatch(r"2[3-5](0[1-9]|1[0-2])\.\d{5}", m.arxiv), m
        assert set(m.losses.values()) <= set(taxonomy.EVIDENCE), m
        assert m.source in taxonomy.SOURCES, m
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in m.losses), m


def test_methods_that_share_a_name_are_different_papers():
    methods = taxonomy.methods().values()
    for name, count in SHARED.items():
        papers = [m.arxiv for m in methods if m.name == name]
        assert len(papers) == len(set(papers)) == count, (name, papers)
    near = {m.label: m.arxiv for m in methods}
    assert len({near[n] for n in ("rDPO (robust)", "R-DPO (length)", "RDPO (rationale)")}) == 3
    assert near["sDPO (stepwise)"] != near["SDPO (segment)"]
    for label in ("GRPO (group robust)", "DAPO (advantage)"):
        assert "not the RL method" in taxonomy.methods()[label].note


def test_a_loss_has_one_evidence_wherever_it_stands():
    found = {}
    for m in taxonomy.methods().values():
        for key, evidence in m.losses.items():
            assert found.setdefault(key, evidence) == evidence, key
    # Read in the tables of losses, one of each kind of evidence.
    assert found["kto"] == "TRL" and found["cal_dpo"] == "official"
    assert found["dpop"] == "public" and found["dro"] == "inferred"


def test_the_tree_has_the_categories_of_the_figure():
    tree = taxonomy.load()
    assert list(tree) == [
        *(c for inside in taxonomy.BRANCHES.values() for c in inside),
        "Other analysis",
        "Outside the figure",
    ]
    assert {c: len(subs) for c, subs in tree.items() if len(subs) > 2} == {"Data quality": 3, "Feedback": 3, "Granularity": 4, "Paradigm": 3}  # fmt: skip
    labels = [m.label for m in tree["Feedback"]["Pair"]]
    assert labels == [
        "DPO",
        "IPO",
        "DPO-RK",
        "DPO-D",
        "BMC",
        "IOPO",
        "PMPO",
        "SAPO",
        "D2O",
        "NPO",
        "SimNPO",
    ]


def test_the_keys_are_those_of_the_registry_and_their_evidence_too():
    found = {k: e for m in taxonomy.methods().values() for k, e in m.losses.items()}
    assert found == {key: spec.evidence for key, spec in REGISTRY.items()}
    ids = {key: {m.arxiv for m in taxonomy.methods().values() if key in m.losses} for key in found}
    for key, spec in REGISTRY.items():  # without an id here: SafeDPO, SFT, cDPO
        assert spec.arxiv in ids[key] or ids[key] == {None}, key


def test_the_listing_has_ids_keys_and_counts():
    text = "\n".join(taxonomy.lines(taxonomy.select("feedback")))
    assert re.search(r"^Feedback \(data strategy\)$", text, re.M)
    assert re.search(r"^    KTO +2402\.01306 +kto \[TRL\], kto_pair \[public\]$", text, re.M)
    assert re.search(r"^  Pair: 11 entries, 8 with a loss \(9 keys\)$", text, re.M)
    assert "Data quality" not in text


def test_only_methods_with_a_loss_are_listed_on_request():
    kept = taxonomy.select(losses=True)
    found = [m for subs in kept.values() for ms in subs.values() for m in ms]
    assert all(m.losses for m in found)
    assert {m.label for m in found} == {m.label for m in taxonomy.methods().values() if m.losses}
    assert "Safety" in kept and "SACPO" not in "\n".join(taxonomy.lines(kept))


def test_an_unknown_category_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(UserError, match="did you mean Granularity"):
        taxonomy.select("granularities")
    assert taxonomy.main(["--category=Nothing at all"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no category 'Nothing at all'") and err.count("\n") == 1
    assert taxonomy.main(["--category=Safety", "--losses"]) == 0
    assert "SafeDPO" in capsys.readouterr().out


def test_the_command_prints_without_loading_jax():
    code = "import sys; from jaxrepro.methods.dpo import taxonomy; taxonomy.main([]); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("in all, each once: ")


def test_the_listing_may_be_cut_short():
    command = f"{sys.executable} -m jaxrepro.methods.dpo.taxonomy | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "Data quality (data strategy)\n" and not done.stderr
