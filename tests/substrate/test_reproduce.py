"""Arms x seeds: order, reuse, interruption, failures, publishing, rendering. Fake runs; nothing trains."""

import json
import sys
import zlib

import pytest

from jaxrepro import config, files, reproduce, results
from jaxrepro import study as studies
from jaxrepro.claims import PRELUDE
from jaxrepro.config import UserError

CONFIG = """
from ml_collections import ConfigDict, config_dict

SIZES = {"tiny": {"needs": "nothing", "minutes": "0"}}


def get_config(size="tiny"):
    config = ConfigDict(dict(method="fake", seed=0, steps=100, alpha=0.1, names=("a", "b")))
    config.init_from = config_dict.placeholder(str)
    config.checkpoint = ConfigDict(dict(every=10))
    return config


def get_claims(size):
    return {
        "seeds": 3,
        "common": {"steps": 60},
        "prelude": {"steps": 0},
        "arms": {"ours": {}, "plain": {"alpha": 0.0, "names": ("a",)}},
        "claims": (
            {"name": "better", "says": "alpha helps", "kind": "paired_difference", "arm": "ours",
             "baseline": "plain", "metric": "after/test/accuracy"},
            {"name": "high", "kind": "threshold", "arm": "ours", "metric": "after/test/accuracy",
             "bound": 0.99},
        ),
    }
"""
CPU = {"platform": "cpu", "kind": "a processor", "count": 1}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A clone with one config; runs and results stay inside it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "fake.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "device", lambda: CPU)
    monkeypatch.setattr(files, "commit", lambda *_: "abc123")
    return tmp_path


class Ended:
    """A process that has ended."""

    def __init__(self, code):
        self.poll = lambda: code


class Fake:
    """Stands in for the launcher: accuracy from alpha and seed, at once. Remembers what it ran."""

    def __init__(self, fail=(), stop_after=None, code=1):
        self.ran, self.fail, self.stop_after, self.code = [], set(fail), stop_after, code

    def __call__(self, study, job, quiet):
        return Ended(self.run(study, job))

    def run(self, study, job):
        resolved = config.load(study.spec, job.words)
        if self.stop_after is not None and len(self.ran) >= self.stop_after:
            return 143
        self.ran.append((job.arm, job.seed))
        job.workdir.mkdir(parents=True, exist_ok=True)
        if (job.arm, job.seed) in self.fail:
            (job.workdir / "metrics.jsonl").write_text("")
            return self.code
        assert resolved.seed == job.seed and resolved.steps == (0 if job.arm == PRELUDE else 60)
        assert (resolved.init_from is None) == (job.arm == PRELUDE)
        noise = zlib.crc32(f"{job.arm}{job.seed}".encode()) % 100 / 1e4
        summary = {"after/test/accuracy": 0.5 + resolved.alpha + noise + job.seed / 20}
        results.write_json(job.workdir / "summary.json", summary)
        return 0


def silent(*_, **__):
    pass


def run(study, fake, **kw):
    return reproduce.execute(study, start=fake, say=silent, **kw)


def test_runs_go_seed_by_seed_with_the_shared_warm_up_first(root):
    fake = Fake()
    run(studies.load("configs/fake.py:tiny"), fake)
    want = [(arm, seed) for seed in range(3) for arm in (PRELUDE, "ours", "plain")]
    assert fake.ran == want


def test_each_arm_starts_from_the_warm_up_of_its_seed(root):
    for job in studies.jobs(studies.load("configs/fake.py")):
        init = [w for w in job.words if w.startswith("--config.init_from=")]
        if job.arm == PRELUDE:
            assert not init
        else:
            assert init[0].endswith(f"/seed{job.seed}") and "/prelude-" in init[0]


def test_finished_runs_are_reused(root):
    study = studies.load("configs/fake.py:tiny")
    run(study, Fake())
    again = Fake()
    found = run(study, again)
    assert again.ran == [] and found["ours"][2].summary is not None


def test_an_interrupted_study_continues_where_it_stopped(root):
    study, first, second = studies.load("configs/fake.py:tiny"), Fake(stop_after=4), Fake()
    with pytest.raises(SystemExit) as e:
        run(study, first)
    assert e.value.code == 143 and len(first.ran) == 4
    run(study, second)
    assert first.ran + second.ran == [(a, s) for s in range(3) for a in (PRELUDE, "ours", "plain")]


def test_a_changed_config_starts_afresh_and_only_where_it_matters(root):
    run(studies.load("configs/fake.py:tiny"), Fake())
    path = root / "configs" / "fake.py"
    path.write_text(CONFIG.replace("every=10", "every=20"))  # cadence changes no result
    same = Fake()
    run(studies.load("configs/fake.py:tiny"), same)
    assert same.ran == []
    path.write_text(CONFIG.replace('"alpha": 0.0', '"alpha": 0.05'))
    fake = Fake()
    run(studies.load("configs/fake.py:tiny"), fake)
    assert fake.ran == [("plain", 0), ("plain", 1), ("plain", 2)]
    path.write_text(
        CONFIG.replace('"prelude": {"steps": 0}', '"prelude": {"steps": 0, "alpha": 0.3}')
    )
    fake = Fake()
    run(studies.load("configs/fake.py:tiny"), fake)
    assert len(fake.ran) == 9  # another warm-up: every arm


def test_more_seeds_reuse_the_first_ones(root):
    run(studies.load("configs/fake.py:tiny", seeds=1), Fake())
    fake = Fake()
    run(studies.load("configs/fake.py:tiny"), fake)
    assert {seed for _, seed in fake.ran} == {1, 2}


def test_arms_limits_what_is_started(root):
    fake = Fake()
    run(studies.load("configs/fake.py:tiny", seeds=1), fake, arms=["plain"])
    assert fake.ran == [(PRELUDE, 0), ("plain", 0)]
    with pytest.raises(UserError, match="'pain' is not one of ours, plain"):
        run(studies.load("configs/fake.py:tiny"), fake, arms=["pain"])


def test_a_failed_run_is_reported_and_tried_again(root):
    study = studies.load("configs/fake.py:tiny")
    run(study, Fake(fail=[("plain", 1)]))
    data = studies.report(study, CPU)
    better = data["claims"][0]
    assert better["verdict"] == "not resolved" and "plain seed 1: exit code 1" in better["note"]
    assert better["values"][1] is not None and better["baseline_values"][1] is None
    again = Fake()
    run(study, again)
    assert again.ran == [("plain", 1)]
    assert studies.report(study, CPU)["claims"][0]["verdict"] == "holds"


def test_arms_of_a_failed_warm_up_are_not_started(root):
    fake = Fake(fail=[(PRELUDE, 0)])
    run(studies.load("configs/fake.py:tiny", seeds=2), fake)
    assert fake.ran == [(PRELUDE, 0), (PRELUDE, 1), ("ours", 1), ("plain", 1)]


def test_a_refused_config_stops_everything_and_a_diverged_run_does_not(root):
    fake = Fake(fail=[("ours", 0)], code=2)  # it had started: metrics.jsonl exists
    run(studies.load("configs/fake.py:tiny"), fake)
    assert len(fake.ran) == 9
    with pytest.raises(UserError, match="the launcher refused it"):
        run(studies.load("configs/fake.py:tiny", workdir="elsewhere"), lambda *_: Ended(2))


def test_the_verdicts_and_their_numbers_are_in_the_file(root):
    study = studies.load("configs/fake.py:tiny")
    run(study, Fake())
    path, reason = studies.publish(study, studies.report(study, CPU), root / "results")
    assert reason == "" and path == root / "results" / "fake-tiny-cpu.json"
    data = json.loads(path.read_text())
    better, high = data["claims"]
    assert better["verdict"] == "holds" and better["lo"] > 0 and better["over"] == "seeds"
    assert high["verdict"] == "contradicted"
    assert better["mean"] == pytest.approx(
        sum(a - b for a, b in zip(better["values"], better["baseline_values"])) / 3
    )
    assert data["seeds"] == [0, 1, 2] and data["minutes"] >= 0 and data["commit"] == "abc123"
    assert (
        data["arms"]["plain"]["per_seed"]["1"]["after/test/accuracy"]
        == better["baseline_values"][1]
    )
    for key in ("schema", "config_hash", "claims_hash", "versions", "device", "cores"):
        assert data[key]


@pytest.mark.parametrize(
    ("kw", "reason"),
    [
        ({"words": ["--config.checkpoint.every=5"]}, "it has overrides"),
        ({"seeds": 2}, "it has 2 seeds of 3"),
    ],
)
def test_only_the_whole_study_goes_to_results(root, kw, reason):
    study = studies.load("configs/fake.py:tiny", **kw)
    run(study, Fake())
    path, why = studies.publish(study, studies.report(study, CPU), root / "results")
    assert why.startswith(reason) and path == study.workdir / "result.json"
    assert not (root / "results").exists()


def test_unfinished_studies_are_not_published(root):
    study = studies.load("configs/fake.py:tiny")
    run(study, Fake(), arms=["ours"])
    _, why = studies.publish(study, studies.report(study, CPU), root / "results")
    assert why == "runs are missing"


def publish(root):
    study = studies.load("configs/fake.py:tiny")
    run(study, Fake())
    studies.publish(study, studies.report(study, CPU), root / "results")


def test_render_is_idempotent_and_reads_only_results(root):
    publish(root)
    text = reproduce.render(root)
    assert text == reproduce.render(root)
    assert "### fake, size tiny, cpu" in text and "**Stale**" not in text
    assert "better: alpha helps" in text and "**holds**" in text and "**contradicted**" in text
    assert "| plain |" in text


def test_nothing_measured_renders_too(root):
    assert reproduce.render(root).count("None measured yet.") == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("alpha=0.1", "alpha=0.2", "the config has changed since"),
        ('"bound": 0.99', '"bound": 0.5', "the claims have changed since"),
        ("alpha helps", "alpha does help", ""),
        ("every=10", "every=20", ""),
        ('SIZES = {"tiny"', 'SIZES = {"small"', "the config is gone or no longer reads"),
    ],
)
def test_stale_is_written_where_a_hash_no_longer_matches(root, old, new, says):
    publish(root)
    (root / "configs" / "fake.py").write_text(CONFIG.replace(old, new))
    text = reproduce.render(root)
    assert ("**Stale**" in text) == bool(says) and says in text


def test_the_command_runs_reports_and_renders(root, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "start", Fake())
    reproduce.main(["--config=configs/fake.py:tiny", "--render"])
    out = capsys.readouterr().out
    assert "HOLDS" in out and "CONTRADICTED" in out and "over 3 seeds" in out
    assert (root / "RESULTS.md").read_text() == reproduce.render(root)
    monkeypatch.setattr(reproduce, "start", lambda *_: pytest.fail("started a run"))
    reproduce.main(["--config=configs/fake.py:tiny", "--only_report"])


def test_a_metric_that_no_run_writes_is_said_after_the_first_run(root, capsys):
    path = root / "configs" / "fake.py"
    path.write_text(CONFIG.replace('"arm": "ours", "metric": "after/test/accuracy"',
                                   '"arm": "ours", "metric": "after/test/acuracy"'))  # fmt: skip
    reproduce.execute(studies.load("configs/fake.py:tiny", seeds=1), start=Fake())
    assert "did you mean after/test/accuracy?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--config=configs/NAME.py[:size] is required"),
        (["--config=configs/fak.py"], "does not exist"),
        (["--config=configs/fake.py:huge"], "has no size 'huge'"),
        (["--config=configs/fake.py", "--seeds=0"], "--seeds=0 is not possible"),
        (["--config=configs/fake.py", "--seed=1"], "did you mean --seeds?"),
        (["--config=configs/fake.py", "--config.alpha=1"], "is what arm plain varies"),
        (["--config=configs/fake.py", "--config.seed=1"], "set by reproduce itself"),
        (["--config=configs/fake.py", "--config.alhpa=1"], "did you mean config.alpha?"),
        (["--config=configs/fake.py", "--arms=pain"], "'pain' is not one of"),
    ],
)
def test_bad_input_is_one_line(root, argv, says):
    with pytest.raises(UserError) as e:
        reproduce.main(argv)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_config_without_claims_says_so(root):
    (root / "configs" / "fake.py").write_text(CONFIG.replace("get_claims", "other"))
    with pytest.raises(UserError, match="has no get_claims"):
        studies.load("configs/fake.py:tiny")


def test_a_run_is_the_launchers_own_command(root):
    study = studies.load("configs/fake.py", words=["--config.checkpoint.every=5"])
    job = studies.jobs(study)[2]
    words = reproduce.command(study, job)
    assert words[1:5] == ["-m", "jaxrepro.launch", "--config=configs/fake.py:tiny", words[4]]
    assert words[5:-1] == [
        "--config.steps=60",
        "--config.checkpoint.every=5",
        "--config.alpha=0.0",
        "--config.names=('a',)",
        "--config.seed=0",
    ]
    assert config.load(study.spec, job.words).names == ("a",)


def a_run_that_waits(root, monkeypatch):
    """The launcher's command becomes a process that waits, and saves on SIGTERM."""
    child = "import signal, sys, time; signal.signal(15, lambda *_: (open('saved', 'a').write('x'), sys.exit(143)));"
    child += "open('ready', 'a').write('x'); time.sleep(60)"
    monkeypatch.setattr(reproduce, "command", lambda *_: [sys.executable, "-c", child])


@pytest.mark.parametrize("at_once", [1, 2])
def test_stopping_this_process_stops_the_runs_and_lets_them_save(root, monkeypatch, at_once):
    a_run_that_waits(root, monkeypatch)
    study = studies.load("configs/fake.py")
    started = lambda: (root / "ready").exists() and len((root / "ready").read_text()) == at_once

    def interrupted(seconds):
        if started():
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.execute(study, at_once=at_once, say=silent)
    assert (root / "saved").read_text() == "x" * at_once
    notes = [studies.note(job) for job in studies.jobs(study)]
    assert sum("minutes" in n for n in notes) == at_once


def test_runs_at_once_wait_for_their_own_warm_up_and_give_the_same_outcomes(root):
    class Slow(Fake):
        """A run ends at the third look at it; `most` is how many ran at once."""

        def __init__(self):
            super().__init__()
            self.now, self.most = set(), 0

        def __call__(self, study, job, quiet):
            assert quiet and ((PRELUDE, job.seed) not in self.now)
            looks, name = [], (job.arm, job.seed)
            self.now.add(name)
            self.most = max(self.most, len(self.now))

            def poll():
                if looks and looks[-1] is not None:
                    return looks[-1]
                looks.append(self.run(study, job) if len(looks) == 2 else None)
                if looks[-1] is not None:
                    self.now.discard(name)
                return looks[-1]

            process = Ended(0)
            process.poll = poll
            return process

    study, slow = studies.load("configs/fake.py:tiny"), Slow()
    found = run(study, slow, at_once=3)
    assert sorted(slow.ran) == sorted((j.arm, j.seed) for j in studies.jobs(study))
    assert slow.most == 3
    alone = run(studies.load("configs/fake.py:tiny", workdir="alone"), Fake())
    assert found == alone


def test_results_md_is_what_render_writes():
    path = config.ROOT / "RESULTS.md"
    assert path.read_text(encoding="utf-8") == reproduce.render(), (
        "run `python -m jaxrepro.reproduce --render`"
    )
