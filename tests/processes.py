"""Helper: the launcher in several processes on this machine, each with fake CPU devices.

As a program: DEVICES METHODS COMMAND...[--- COMMAND...]: one command of jaxrepro after the other in one
process, for instance `launch --config=...`; METHODS is a folder of methods beside the real ones.
"""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "substrate" / "fixtures"
METHODS = FIXTURES / "methods"
DECODER = f"--config={FIXTURES / 'launch' / 'decoder.py'}"


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(commands, *, count=2, devices=4, address=None, env=None, cwd=ROOT, only=None):
    """`count` processes (or the one number `only`), each running the commands (lists of words) with its
    flags; stderr in stdout."""
    address = address or free_address()
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | (env or {})
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")]).rstrip(":")
    found = []
    for i in range(count) if only is None else [only]:
        words = [sys.executable, __file__, str(devices), str(METHODS)]
        for command in commands:
            words += [*command, f"--coordinator={address}", f"--process_count={count}"]
            words += [f"--process_id={i}", "---"]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found.append(subprocess.Popen(words[:-1], cwd=cwd, env=clean, **streams))
    return found


def finish(processes, *, timeout=150):
    """[(exit code, output)]; none outlives a failure."""
    try:
        texts = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, text) for p, text in zip(processes, texts)]


def main(argv):
    import jax

    import jaxrepro.methods
    from jaxrepro import cli

    jax.config.update("jax_num_cpu_devices", int(argv[0]))
    jaxrepro.methods.__path__.append(argv[1])
    rest = argv[2:]
    while True:
        end = rest.index("---") if "---" in rest else len(rest)
        command, rest = rest[:end], rest[end + 1 :]
        module = importlib.import_module(f"jaxrepro.{command[0]}")
        if not rest:
            cli.main(module.main, command[1:])
        if code := cli.guard(module.main, command[1:]):
            sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
