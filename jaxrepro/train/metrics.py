"""What a run reports: metrics.jsonl, TensorBoard events, a progress line (curves.png: curves.py).

A line of metrics.jsonl is {"stage": "rl", "step": 12, "loss": ...}; step = updates done, so step 0
is before the first. Numbers are finite; what was not measured is left out.
"""

import json
import sys
import time
from pathlib import Path

from jaxrepro.config import UserError
from jaxrepro.files import write_text, writing

FILE, EVENTS = "metrics.jsonl", "tensorboard"


def read(path) -> list[dict]:
    """Lines of a metrics.jsonl; one that was cut off by a crash is left out."""
    lines = []
    path = Path(path)
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class Metrics:
    """Writer of one run's numbers into `workdir`. `wandb`: name of a project, or empty."""

    def __init__(self, workdir, *, tensorboard: bool = True, wandb: str | None = None):
        self.workdir = Path(workdir)
        self.path = self.workdir / FILE
        self._tensorboard, self._writers, self._starts = tensorboard, {}, {}
        self._file = self._wandb = None
        self._project = wandb
        if wandb:  # looked for now; it makes files at the first number
            try:
                import wandb
            except ImportError as error:
                raise UserError(
                    f"log.wandb={self._project} needs the package: pip install wandb"
                ) from error

    def rewind(self, stage: str, step: int | None) -> None:
        """Forget lines of `stage` after `step` (None: all): they will be measured again."""
        self._close_file()
        self._starts[stage] = 0 if step is None else step
        if not self.path.exists():
            return
        last = -1 if step is None else step
        kept = [x for x in read(self.path) if x.get("stage") != stage or x.get("step", 0) <= last]
        with writing(self.path):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Add one line; it is in the file, not in a buffer, when this returns."""
        with writing(self.path):
            if self._file is None:
                self._file = self.path.open("a")
            line = {"stage": stage, "step": step} | values
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            if self._tensorboard:
                writer = self._writer(stage)
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
        if self._project:
            if self._wandb is None:
                import wandb

                self._wandb = wandb.init(
                    project=self._project, dir=str(self.workdir), resume="allow"
                )
            self._wandb.log(
                {f"{stage}/{k}": v for k, v in values.items()} | {f"{stage}/step": step}
            )

    def _writer(self, stage: str):
        if stage not in self._writers:
            from tensorboardX import SummaryWriter

            start = self._starts.get(stage, 0)
            folder = str(self.workdir / EVENTS / stage)
            purge = start + 1 if start else None
            self._writers[stage] = SummaryWriter(folder, purge_step=purge)
        return self._writers[stage]

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Flush everything."""
        self._close_file()
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        if self._wandb:
            self._wandb.finish()
            self._wandb = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """A tqdm bar on a terminal, else a line every `every` seconds; both with an ETA."""

    def __init__(self, stage: str, start: int, total: int, *, show=(), every: float | int = 10):
        self.stage, self.start, self.total = stage, start, total
        self.show, self.every = tuple(show), every
        self._begun = self._said = time.monotonic()
        self._values: dict[str, float] = {}
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=stage, dynamic_ncols=True)

    def numbers(self, values: dict[str, float]) -> None:
        """The newest metrics; those named in `show` are printed."""
        self._values |= {k: values[k] for k in self.show if k in values}

    def step(self, done: int) -> None:
        """`done` steps of `total` are behind us."""
        text = "  ".join(f"{k} {v:.4g}" for k, v in self._values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said < self.every and done < self.total:
            return
        self._said = now
        rate = (done - self.start) / max(now - self._begun, 1e-9)
        eta = _clock((self.total - done) / rate) if rate else "?"
        print(f"{self.stage} {done}/{self.total}  {text}  {rate:.3g} it/s  eta {eta}", flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
