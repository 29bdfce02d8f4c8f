"""Exact values of LaTeX and ASCII expressions: a small recursive parser, no `eval`, no symbolic package.

Numbers are fractions; roots, pi and functions are floats. Two expressions with variables are compared at
fixed rational points (the identity test of Schwartz and Zippel, made deterministic). Bounds are on length,
nesting, powers and factorials, never on time.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_DEPTH = 12  # nesting of brackets, powers and functions

_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d{1,2}(?!\d))?|\.\d+(?:[eE][+-]?\d{1,2}(?!\d))?)"
    r"|(\\?[A-Za-z]+(?:_(?:\{\w+\}|\w))?)|(.))"
)
_FUNCTIONS = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "ln": math.log,
    "log": math.log10,
    "exp": math.exp,
}
_PRIMES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
    41,
    43,
    47,
    53,
    59,
    61,
    67,
    71,
    73,
    79,
    83,
    89,
    97,
)


def identical(a: str, g: str) -> bool:
    """Whether two expressions agree in value, with variables at fixed rational points."""
    if not all(re.search(r"[\d+*/^=\\-]", s) for s in (a, g)):
        return False  # plain words are compared as text
    ta, tg = parse(thousands(a)), parse(thousands(g))
    if ta is None or tg is None or variables(ta) != variables(tg):
        return False
    names, hits = sorted(variables(tg)), 0
    for k in range(5):
        env = {
            n: Fraction(_PRIMES[(3 * i + 7 * k) % 25], _PRIMES[(5 * i + k + 11) % 25])
            for i, n in enumerate(names)
        }
        if k == 4:
            env = {n: -x for n, x in env.items()}
        x, y = evaluate(ta, env), evaluate(tg, env)
        if x is None and y is None:
            continue  # outside the domain of both
        if x is None or y is None or not close(x, y):
            return False
        hits += 1
    return hits >= 2 or (hits == 1 and not names)


class _Bad(Exception):
    """Not an expression that this parser reads."""


def parse(s: str) -> tuple | None:
    """Expression tree of LaTeX or ASCII mathematics; None where it is something else or too deep."""
    if len(s) > MAX_LENGTH:
        return None
    tokens = [next(t for t in m.groups() if t is not None) for m in _TOKEN.finditer(s.strip())]
    try:
        tree, end = _sum(tokens, 0, 0)
    except _Bad:
        return None
    return tree if end == len(tokens) else None


def _sum(t: list[str], i: int, depth: int) -> tuple[tuple, int]:
    if depth > MAX_DEPTH:
        raise _Bad
    left, i = _product(t, i, depth)
    while i < len(t) and t[i] in "+-":
        right, j = _product(t, i + 1, depth)
        left, i = (t[i], left, right), j
    return left, i


def _product(t: list[str], i: int, depth: int) -> tuple[tuple, int]:
    sign = 1
    while i < len(t) and t[i] in "+-":
        sign, i = (-sign if t[i] == "-" else sign), i + 1
    left, i = _power(t, i, depth)
    while i < len(t) and (t[i] in "*/" or t[i] in "({" or t[i][0] == "\\" or t[i][0].isalnum()):
        op, i = (t[i], i + 1) if t[i] in "*/" else ("*", i)
        minus = i < len(t) and t[i] == "-"
        right, i = _power(t, i + minus, depth)
        left = (op, left, ("-", ("n", Fraction(0)), right) if minus else right)
    return (left if sign == 1 else ("-", ("n", Fraction(0)), left)), i


def _power(t: list[str], i: int, depth: int) -> tuple[tuple, int]:
    base, i = _atom(t, i, depth)
    while i < len(t) and t[i] == "!":
        base, i = ("!", base), i + 1
    if i < len(t) and t[i] == "^":
        minus = i + 1 < len(t) and t[i + 1] == "-"
        if depth + 1 > MAX_DEPTH:
            raise _Bad
        exponent, i = _power(t, i + 1 + minus, depth + 1)
        return ("^", base, ("-", ("n", Fraction(0)), exponent) if minus else exponent), i
    return base, i


def _atom(t: list[str], i: int, depth: int) -> tuple[tuple, int]:
    if i >= len(t):
        raise _Bad
    s = t[i]
    if s[0].isdecimal() or (s[0] == "." and len(s) > 1):
        return ("n", Fraction(s)), i + 1
    if s in ("(", "{", "["):
        inner, j = _sum(t, i + 1, depth + 1)
        if j >= len(t) or t[j] != {"(": ")", "{": "}", "[": "]"}[s]:
            raise _Bad
        return inner, j + 1
    name = s.lstrip("\\")
    if s == "\\frac":
        top, j = _atom(t, i + 1, depth + 1)
        bottom, j = _atom(t, j, depth + 1)
        return ("/", top, bottom), j
    if name == "sqrt":
        root, j = ("n", Fraction(2)), i + 1
        if j < len(t) and t[j] == "[":
            root, j = _atom(t, j, depth + 1)
        inner, j = _atom(t, j, depth + 1)
        return ("^", inner, ("/", ("n", Fraction(1)), root)), j
    if name in _FUNCTIONS:
        inner, j = _power(t, i + 1, depth + 1) if depth < MAX_DEPTH else _fail()
        return ("f", name, inner), j
    if name == "pi":
        return ("n", math.pi), i + 1
    if s[0] == "\\" or "_" in s or (len(s) == 1 and s.isalpha()):
        return ("v", s.replace("{", "").replace("}", "")), i + 1
    if s.isalpha() and len(s) <= 3:  # xy is x y; longer runs are words
        tree = ("v", s[0])
        for ch in s[1:]:
            tree = ("*", tree, ("v", ch))
        return tree, i + 1
    raise _Bad


def _fail():
    raise _Bad


def variables(tree: tuple) -> set[str]:
    """Names of the variables of a tree."""
    if tree[0] == "v":
        return {tree[1]}
    return set().union(*(variables(x) for x in tree[1:] if isinstance(x, tuple)))


def evaluate(tree: tuple, env: Mapping[str, Fraction]) -> Fraction | float | None:
    """Value at a point; None outside the domain or the bounds."""
    try:
        x = _value(tree, env)
    except (ArithmeticError, ValueError, _Bad):
        return None
    return x if isinstance(x, Fraction) or math.isfinite(x) else None


def _value(tree: tuple, env: Mapping[str, Fraction]) -> Fraction | float:
    op = tree[0]
    if op == "n":
        return tree[1]
    if op == "v":
        return env[tree[1]]
    if op == "f":
        return _FUNCTIONS[tree[1]](float(_value(tree[2], env)))
    x = _value(tree[1], env)
    if op == "!":
        if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 50:
            raise _Bad
        return Fraction(math.factorial(int(x)))
    y = _value(tree[2], env)
    if op == "+":
        return x + y
    if op == "-":
        return x - y
    if op == "*":
        return x * y
    if op == "/":
        return x / y
    return _raised(x, y)


def _raised(x: Fraction | float, y: Fraction | float) -> Fraction | float:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if y.denominator == 1:
            bits = x.numerator.bit_length() + x.denominator.bit_length()
            if abs(y) * bits > 4096:
                raise _Bad
            return x ** int(y)
        if x >= 0 and y.denominator <= 8 and abs(y.numerator) <= 8:  # a perfect power stays exact
            k = y.denominator
            top, bottom = (round(float(n) ** (1 / k)) for n in (x.numerator, x.denominator))
            if bottom and Fraction(top, bottom) ** k == x:
                return Fraction(top, bottom) ** y.numerator
    out = float(x) ** float(y)
    if isinstance(out, complex):
        raise _Bad
    return out


def close(x: Fraction | float, y: Fraction | float, tol: float = 0.0) -> bool:
    """Equal fractions, floats within a relative 1e-9, or anything within the relative `tol` of y."""
    if tol:
        return abs(Fraction(x) - Fraction(y)) <= Fraction(tol) * abs(Fraction(y))
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        x, y = float(x), float(y)
    except OverflowError:
        return False
    return abs(x - y) <= max(1e-9 * max(abs(x), abs(y)), 1e-12)


def thousands(s: str) -> str:
    """Separators out of well-formed numbers: 1,234,567 but not 1,2."""
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), s)
