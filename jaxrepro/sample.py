"""Asks what a run trained: python -m jaxrepro.sample --workdir=runs/NAME [--prompt=... --image=FILE]

Without a prompt the method takes questions of its own test data. Prints each answer as it is.

With --config=configs/NAME.py[:size] --config.key=value instead of a trained run the weights are those that the config
names, for methods that can do so (vorta, config.steps=0); what is written goes to --workdir.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from jaxrepro import cli
from jaxrepro import config as configuration
from jaxrepro.config import LARGEST_SEED, UserError


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input."""
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of a run of jaxrepro.launch", **text)
    flags.DEFINE_string("prompt", None, "the question; default: questions of the test data", **text)
    flags.DEFINE_string("image", None, "image file that the question is about", **text)
    flags.DEFINE_integer("n", 1, "number of answers", lower_bound=1, **text)
    flags.DEFINE_float(
        "temperature",
        None,
        "0 = greedy; default: greedy for one answer, else the run's own sampling temperature",
        lower_bound=0.0,
        **text,
    )
    bounds = dict(lower_bound=0, upper_bound=LARGEST_SEED)
    flags.DEFINE_integer("seed", 0, "the same seed gives the same answers", **bounds, **text)
    cli.distributed_flags(parser)
    if cli.wants_help(argv):
        cli.parse_flags(parser, argv, __doc__)
    given, _, rest = configuration.take_config(argv)
    cli.parse_flags(parser, rest, __doc__)
    workdir = parser["workdir"].value
    config = cli.trained(workdir) if given is None else given
    check_image(parser["image"].value)
    method = cli.method(config)
    if not hasattr(method, "sample"):
        raise UserError(f"{config.method} produces no samples; use jaxrepro.evaluate")
    if given is not None:
        check_ready(method, config, workdir)
    cli.setup_jax()
    cli.join(parser)
    cli.fit_mesh(config)
    names = ("prompt", "image", "n", "temperature", "seed")
    answers = method.sample(config, workdir, **{name: parser[name].value for name in names})
    cli.say("\n\n".join(answers))


def check_ready(method: ModuleType, config: ConfigDict, workdir: str | None) -> None:
    """Raises UserError unless the method samples by a config alone, and there is a place to write to."""
    if not hasattr(method, "ready"):
        raise UserError(
            f"{config.method} samples what a run trained: give --workdir, and leave --config out"
        )
    if not method.ready(config):
        raise UserError(
            f"--config.steps={config.steps} would be trained: use --config.steps=0 and weights, or --workdir alone"
        )
    if not workdir:
        raise UserError("--workdir=FOLDER is required: what is sampled is written there")


def check_image(path: str | None) -> None:
    """Raises UserError unless Pillow can read the file."""
    if path is None:
        return
    from PIL import Image

    if not Path(path).is_file():
        raise UserError(f"--image={path} does not exist")
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "it is damaged or of an unknown format"
        if isinstance(e, PermissionError):
            reason = "permission denied"
        raise UserError(f"--image={path} cannot be read: {reason}; use a PNG or JPEG") from e


if __name__ == "__main__":
    cli.main(main)
