"""A trace of some steps for XProf: `--profile=start:count` writes it to <workdir>/profile."""

from pathlib import Path

import jax

from jaxrepro.config import UserError


class Profile:
    """Traces steps start .. start + count - 1 of the first stage that reaches them. None: nothing."""

    def __init__(self, text: str | None, folder):
        self.folder, self.first, self.count, self._on = Path(folder), -1, 0, False
        if text:
            first, _, count = str(text).partition(":")
            if not (first.isdigit() and count.isdigit() and int(count) > 0):
                raise UserError(f"profile={text!r} is not start:count; use for example 10:5")
            self.first, self.count = int(first), int(count)

    def before(self, i: int) -> None:
        """Called before step i."""
        if self._on and i >= self.first + self.count:
            self.stop()
        if i == self.first and not self._on:
            self.first, self._on = i, True
            jax.profiler.start_trace(str(self.folder))

    def stop(self) -> None:
        """End the trace if one is on."""
        if self._on:
            self._on, self.first = False, -1
            jax.profiler.stop_trace()
