"""Who may import whom, read from the source: the layers, the pure files, and what nobody uses."""

import ast
from pathlib import Path

import pytest

import jaxrepro

PACKAGE = Path(jaxrepro.__file__).parent
LAYERS = [
    {"config"},
    {"sharding", "stats", "files", "cluster", "exits"},
    {"ops", "distributed"},
    {"models"},
    {"rollout", "rl", "rewards", "data", "envs"},
    {"train"},
    {"methods"},
    {"cli", "claims", "results"},  # what the commands share
    {"launch", "evaluate", "sample", "bench", "export", "study"},
    {"reproduce"},  # renders what bench measured, too
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
PURE = {"jax", "numpy", "jaxtyping", "typing", "collections", "dataclasses", "functools", "math"}
PURE |= {
    "__future__",
    "jaxrepro.ops",
    "jaxrepro.rl",
    "jaxrepro.models",
    "jaxrepro.config.UserError",
}

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> set[str]:
    """Full dotted names that a file imports, at its top or inside functions."""
    package = ("jaxrepro", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{name.name}" for name in node.names}
    return found


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_the_layers_below_it(name):
    parts = Path(name).with_suffix("").parts
    room = parts[0]
    if room == "__init__":
        assert not [i for i in imports(PACKAGE / name) if i.startswith("jaxrepro")]
        return
    assert room in LEVEL, f"{room} has no layer yet: add it to LAYERS and to architecture"
    for full in imports(PACKAGE / name):
        if not full.startswith("jaxrepro.") or full == "jaxrepro.__version__":
            continue
        other = full.split(".")[1]
        if room == "methods" == other:
            # A method never imports another; two methods meet in the substrate.
            assert len(parts) > 2 and full.split(".")[2] == parts[1], full
        elif other != room:
            assert LEVEL[other] < LEVEL[room], f"{name} imports {full}"


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("objective.py", "algorithm.py"))])
def test_the_mathematics_of_a_method_is_pure(name):
    path = PACKAGE / name
    own = "jaxrepro." + ".".join(Path(name).parent.parts)
    foreign = [i for i in imports(path) if not within(i, PURE | {own})]
    assert not foreign, foreign
    calls = {
        n.func.id
        for n in ast.walk(tree(path))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert not calls & {"print", "open", "input"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_evaluated_unpickled_or_private_to_jax(name):
    path = PACKAGE / name
    banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "jax.core", "jax.interpreters"}
    assert not [i for i in imports(path) if within(i, banned)]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), node.lineno
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert f"{node.value.id}.{node.attr}" not in banned, node.lineno


def test_config_files_import_only_what_is_quick():
    for path in sorted((PACKAGE.parent / "configs").glob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names = [n.name for n in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert all(within(n, {"ml_collections", "jaxrepro", "math"}) for n in names), names
