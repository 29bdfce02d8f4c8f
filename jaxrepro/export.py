"""Takes what a run trained to Hugging Face: python -m jaxrepro.export --workdir=runs/NAME --out=FOLDER

Writes weights, config.json, generation_config.json, the tokenizer and a model card, whole or not at
all. Adapters are merged. transformers loads the folder; the licence is left to you.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxrepro import __version__, cli
from jaxrepro import config as configuration
from jaxrepro.config import UserError
from jaxrepro.files import read_json

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input."""
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of a finished run of jaxrepro.launch", **text)
    flags.DEFINE_string("out", None, "folder to write; new or empty", **text)
    flags.DEFINE_enum(
        "dtype", None, DTYPES, "of the weights; default: that of the parameters", **text
    )
    cli.parse_flags(parser, argv, __doc__)
    workdir, out = parser["workdir"].value, parser["out"].value
    config = cli.trained(workdir)
    check_out(out)
    summary = finished(workdir)
    method = cli.method(config)
    if not hasattr(method, "export"):
        raise UserError(f"{config.method} has nothing that Hugging Face could load")
    cli.setup_jax()
    cli.fit_mesh(config)
    params, cfg, tokenizer = method.export(config, workdir)
    run = read_json(Path(workdir) / "config.json")
    readme = card(config, run, summary, name=Path(out).name)
    write(out, params, cfg, tokenizer, readme, parser["dtype"].value)
    print(f"wrote {out}: {_size(out)}; it names no licence yet (README.md)")


def check_out(out: str | None) -> None:
    """UserError unless a folder can be made there."""
    if not out:
        raise UserError("--out=FOLDER is required: the folder to write")
    path = Path(out)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"--out={out} exists and is not an empty folder; choose another, or remove it"
            )
        made = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(dir=path.parent).cleanup()
        finally:  # what was made to see whether it can be
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out={out} cannot be made ({reason}); choose another") from error


def finished(workdir: str) -> dict[str, float]:
    """The results of a run; UserError where it has not come to its end."""
    path = Path(workdir) / "summary.json"
    if not path.is_file():
        raise UserError(
            f"--workdir={workdir} is not finished: it has no summary.json; start the same launch "
            "command again and let it end"
        )
    return read_json(path)


def write(
    out: Any, params: Any, cfg: Any, tokenizer: Any, readme: str, dtype: str | None = None
) -> None:
    """The folder: merged weights, configs, tokenizer (a folder, an object with save, or None), README.md."""
    from jaxrepro.models import hf, lora
    from jaxrepro.models.qwen2_vl import Qwen2VLConfig

    if isinstance(cfg, Qwen2VLConfig):
        text, decoder = lora.merge(params["text"], cfg.text)
        params, cfg = params | {"text": text}, dataclasses.replace(cfg, text=decoder)
    else:
        params, cfg = lora.merge(params, cfg)
    hf.save(out, params, cfg, dtype=dtype, tokenizer=tokenizer, files={"README.md": readme})


def card(config: Any, run: Mapping[str, Any], summary: Mapping[str, float], *, name: str) -> str:
    """The model card of a run: what was trained, from what, with which results and settings.

    `run` is the content of the workdir's config.json.
    """
    settings = _portable(json.loads(configuration.to_json(config)))
    given = (config.get("model") or {}).get("path")
    base = (settings.get("model") or {}).get("path")
    front = ["library_name: transformers", f"tags: [jaxrepro, {config.method}]"]
    if base and base == given:  # a name of the hub
        front.append(f"base_model: {json.dumps(base)}")
    versions = f"jaxrepro {__version__}, commit {run.get('commit')}, jax {run.get('jax')}"
    return f"""---
{chr(10).join(front)}
---

# {name}

Trained by the method `{config.method}` of jaxrepro ({versions}).

Base model: {base or "none, trained from scratch"}.

## Results

Measured by the run itself; an interval where the method reports one.

{_results(summary)}

## Licence

Not stated. Weights that were trained from a base model stay under its licence, and data may bring terms of
its own. Write the licence here, and as `license:` in the header, before you share the model.

## Settings

```json
{json.dumps(settings, indent=1)}
```
"""


def _portable(value: Any) -> Any:
    """Settings without the folders of this machine: of a path that exists here, its last part."""
    if isinstance(value, dict):
        return {key: _portable(v) for key, v in value.items()}
    if isinstance(value, str) and "/" in value and Path(value).expanduser().exists():
        return Path(value).name
    return value


def _results(summary: Mapping[str, float]) -> str:
    """A table of the metrics; `_lo` and `_hi` beside their estimate."""
    bounds = {f"{key}{end}" for key in summary for end in ("_lo", "_hi")}
    rows = ["| metric | value | interval |", "|---|---|---|"]
    for key in sorted(summary.keys() - bounds):
        lo, hi = summary.get(f"{key}_lo"), summary.get(f"{key}_hi")
        interval = "" if lo is None or hi is None else f"[{lo:.4g}, {hi:.4g}]"
        rows.append(f"| {key} | {summary[key]:.4g} | {interval} |")
    return "\n".join(rows)


def _size(out: str) -> str:
    files = sorted(Path(out).iterdir())
    total = sum(path.stat().st_size for path in files)
    return f"{len(files)} files, {total / 1e6:.1f} MB"


if __name__ == "__main__":
    cli.main(main)
