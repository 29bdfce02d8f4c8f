"""Is an answer equal to the gold answer? Exact, deterministic, without extra packages.

Rules, in order: equal text; multiple choice; "x = 5" against "5"; lists, tuples, sets, intervals; numbers
with units, percentages and thousands separators (a sum or product is not the number that it would give:
"4 + 4" does not answer 8); expressions, compared as values at fixed rational points
(the identity test of Schwartz and Zippel, made deterministic). Numbers are exact fractions; only roots,
pi and functions are floats (relative 1e-9). Nothing is ever evaluated by Python: a small parser reads LaTeX
and ASCII, bounded by length and nesting, not by a clock, so that the same text always scores the same.

`checker="math_verify"` asks that package first, gold first (its comparison is not symmetric), with its
timeouts off and the same bounds; expressions that could explode are left to the rules.
"""

import re
from collections.abc import Mapping
from fractions import Fraction

from jaxrepro.config import UserError
from jaxrepro.rewards.expressions import (
    MAX_DEPTH,
    MAX_LENGTH,
    close,
    evaluate,
    identical,
    parse,
    thousands,
    variables,
)

CHECKERS = ("rules", "math_verify")

_REPLACE = [
    (r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox|operatorname|textrm)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])", ""),
    (r"\{,\}|,\\!", ","),
    (r"\\[!,]", ""),
    (r"\\[;: ]|~|\\q?quad", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degrees"),
    (r"\\cdot|\\times|[×·]", "*"),
    (r"\\div|÷", "/"),
    (r"\\%", "%"),
    (r"\\\$", "$"),
    (r"\\\{", "⦃"),
    (r"\\\}", "⦄"),
    (r"[−–]", "-"),
    (r"√", r"\\sqrt"),
    (r"π", r"\\pi"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"\*\*", "^"),
]
_REPLACE = [(re.compile(a), b) for a, b in _REPLACE]
# "1 000" is 1000, "1 2" is not 12.
_BLANK = re.compile(r"(?<!\d) +| +(?!\d)|(?<=\d) (?=\d{3}(?: \d{3})*(?!\d))")
_PLAIN = re.compile(r"[+-]?\$?[\d.,]*\d ?(?:%|[A-Za-z][A-Za-z/^ 23]*)?")
# A sum or product of numbers; 6.7 * 10^5 is the way to write a number.
_INFIX = re.compile(r"[\d)}!%] *(?:[+-]|\*(?! *10 *\^)) *[\d(\\.-]")


def _vocabulary(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_WORDS = _vocabulary(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
_WORDS = {w: str(i) for i, w in enumerate(_WORDS)}
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_UNITS = _vocabulary(
    "mm cm dm m km meter metre millimeter centimeter kilometer inch in foot feet ft yard yd mile mi "
    "mg g gram kg kilogram lb pound oz ounce ton l liter litre ml gallon ms s sec second minute min hour "
    "h hr day week month year degree deg radian rad k c f dollar cent euro usd unit point coin piece "
    "percent mph kph km/h m/s cm/s ft/s person people student time way"
)
_ALIAS = {
    "meter": "m", "metre": "m", "centimeter": "cm", "millimeter": "mm", "kilometer": "km", "inch": "in",
    "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb",
    "ounce": "oz", "liter": "l", "litre": "l", "second": "s", "sec": "s", "minute": "min", "hour": "h",
    "hr": "h", "deg": "degree", "radian": "rad", "usd": "dollar", "sq": "square", "inche": "in", "people": "person",
}  # fmt: skip
_NOT_UNITS = _vocabulary(
    "or and to more less than half dozen times of over between not is plus minus about pi sqrt sin cos tan log exp"
)


def correct(
    answer: str | None, gold: str, *, checker: str = "rules", tolerance: float = 0.0
) -> bool | None:
    """Whether `answer` equals `gold`; None (unscorable) where there is no gold answer.

    `tolerance` is relative and for numbers only (0.05: ChartQA's relaxed accuracy). Raises UserError for
    an unknown checker, or for "math_verify" where that package is missing.
    """
    if checker not in CHECKERS:
        raise UserError(f"checker is {checker!r}; choose one of {', '.join(CHECKERS)}")
    if not gold or not gold.strip():
        return None
    if answer is None or not answer.strip():
        return False
    if checker == "math_verify" and _math_verify(answer, gold):
        return True
    return equal(answer, gold, tolerance=tolerance)


def reward(example: Mapping, text: str) -> dict[str, float | None]:
    """Accuracy of the answer that `text` states, against `example["solution"]` (text or bare answer)."""
    ok = correct(extract(text), extract(example["solution"]) or "")
    return {"accuracy": None if ok is None else float(ok)}


def extract(text: str) -> str | None:
    """The answer a solution states: last \\boxed{}, after "####", after "answer is", else its last line."""
    if (box := boxed(text)) is not None:
        return box
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    if hits := re.findall(r"answer is:?[ \t]*\n?[ \t]*([^\n]*)", text, re.IGNORECASE):
        return hits[-1].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}; None where there is none or its braces never close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i].strip()
    return None


# ---- comparison


def equal(answer: str, gold: str, *, tolerance: float = 0.0) -> bool:
    """Whether two answers say the same. Not symmetric: a unit or label in `gold` may be left out."""
    return _equal(normalise(answer), normalise(gold), tolerance, 5)


def normalise(text: str) -> str:
    """Text without layout: maths delimiters, \\text, spacing commands, full stop, surrounding blanks."""
    box = boxed(text)
    text = text if box is None else box
    for pattern, to in _REPLACE:
        text = pattern.sub(to, text)
    text = re.sub(r"\\[()\[\]]", "", text)
    if text.count("$") != 1:  # one alone is a currency, more are maths delimiters
        text = text.replace("$", "")
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`*").rstrip(".;:").strip()
    return re.sub(r"\\frac\s*([0-9])\s*(?=[0-9{])", r"\\frac{\1}", text)


def _key(text: str) -> str:
    text = _BLANK.sub("", text.casefold())
    return _WORDS.get(text, text)


def _unevaluated(a: str, g: str) -> bool:
    """Whether the gold answer is a plain number and the answer a sum or product that would give one."""
    return bool(_PLAIN.fullmatch(g) and _INFIX.search(a))


def _equal(a: str, g: str, tol: float, depth: int) -> bool:
    if not a or not g:
        return False
    if _key(a) == _key(g):
        return True
    if depth == 0 or len(a) > MAX_LENGTH or len(g) > MAX_LENGTH:
        return False
    (la, ca), (lg, cg) = _choice(a), _choice(g)
    if lg and (la or a.upper() == lg):
        return (la or lg) == lg
    if lg:
        return cg is not None and _equal(a, cg, tol, depth - 1)
    if la:
        return ca is not None and _equal(ca, g, tol, depth - 1)
    (sa, va), (sg, vg) = _sides(a), _sides(g)
    if sa or sg:
        if sa and sg and _key(sa) != _key(sg):
            return False
        return _equal(va, vg, tol, depth - 1)
    xs, ys = _items(a), _items(g)
    if xs or ys:
        return bool(xs and ys) and _lists(xs, ys, tol, depth - 1)
    if _unevaluated(a, g):
        return False
    na, ng = _number(a), _number(g) or _number(g, any_unit=True)
    if na and ng:
        return _numbers(na, ng, tol)
    return identical(a, g)


def _choice(s: str) -> tuple[str | None, str | None]:
    """("B", "12") of "(B) 12", "B. 12", "option B"; (None, None) where no letter is chosen."""
    if re.fullmatch(r"[A-J]", s):
        return s, None
    m = re.fullmatch(
        r"(?:option|choice|answer)(?: is)?:? *[(\[]?([A-Ja-j])[)\]]?", s, re.IGNORECASE
    )
    m = m or re.fullmatch(r"[(\[]([A-Ja-j])[)\]](?: *(.+))?", s)
    m = m or re.fullmatch(r"([A-J])[).:](?: *(.+))?", s)
    return (m[1].upper(), m[2] if m.lastindex == 2 else None) if m else (None, None)


def _sides(s: str) -> tuple[str | None, str]:
    """("x", "5") of "x = 5"; (None, s) where s is no definition."""
    m = re.fullmatch(r"([A-Za-z\\][^=<>]{0,24}?) *= *([^=<>]+)", s)
    return (m[1], m[2]) if m else (None, s)


def _items(s: str) -> tuple[str, list[str]] | None:
    """(brackets, items) of a tuple, interval, set or bare list; "" and "{}" are unordered."""
    kind, body = "", s
    if s[0] in "([" and s[-1] in ")]" and _spans(s):
        kind, body = s[0] + s[-1], s[1:-1]
    elif (s[0], s[-1]) in (("⦃", "⦄"), ("{", "}")) and _spans(s):
        kind, body = "{}", s[1:-1]
    else:
        body = thousands(s)
        body = re.sub(r",? (?:and|or) ", ", ", body)
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(body):
        depth += (ch in "([{⦃") - (ch in ")]}⦄")
        if ch == "," and depth == 0:
            parts.append(body[start:i].strip())
            start = i + 1
    parts.append(body[start:].strip())
    if len(parts) == 1 and kind != "{}":
        return None
    return kind, parts


def _spans(s: str) -> bool:
    depth = 0
    for i, ch in enumerate(s):
        depth += (ch in "([{⦃") - (ch in ")]}⦄")
        if depth == 0:
            return i == len(s) - 1
    return False


def _lists(xs: tuple[str, list[str]], ys: tuple[str, list[str]], tol: float, depth: int) -> bool:
    (ka, a), (kg, g) = xs, ys
    free = {"", "{}"}
    if len(a) != len(g) or (ka != kg and not {ka, kg} <= free):
        return False
    if ka not in free:
        return all(_equal(x, y, tol, depth) for x, y in zip(a, g))
    rest = list(a)
    for y in g:
        hit = next((i for i, x in enumerate(rest) if _equal(x, y, tol, depth)), None)
        if hit is None:
            return False
        rest.pop(hit)
    return True


# ---- numbers with units


def value(text: str) -> Fraction | float | None:
    """Numeric value of an answer, unit dropped; a percentage is a fraction of 1. None: not a number."""
    n = _number(normalise(text))
    return None if n is None else n[0] / 100 if n[2] else n[0]


def _number(s: str, any_unit: bool = False) -> tuple[Fraction | float, str, bool] | None:
    """(value, unit, is percent); a percentage keeps the number as written."""
    if len(s) > MAX_LENGTH:
        return None
    s = thousands(s.replace("$", ""))
    s = _WORDS.get(s.casefold(), s)
    s = re.sub(r" ?%$| percent$", "%", s, flags=re.IGNORECASE)
    percent = s.endswith("%")
    s = s.rstrip("%").strip()
    unit, scale = "", 1
    m = re.fullmatch(r"(.*?[\d)}!.])( ?)([A-Za-z][A-Za-z/^ 23().]*)", s)
    if m and not percent:
        words = m[3].casefold().replace("per ", "/").split()
        if words and words[0] in _SCALES:
            scale = _SCALES[words.pop(0)]
        unit = _unit(words, any_unit)
        if unit is None or (not m[2] and len(m[3]) == 1):  # "5m" is a product, "5 m" a length
            return None
        s = m[1]
    mixed = re.fullmatch(
        r"(-?)(\d+) ?(?:\\frac *\{ *(\d+) *\} *\{? *(\d+) *\}?|(?<= )(\d+)/(\d+))", s
    )
    if mixed:
        sign, whole, top, bottom = mixed[1], mixed[2], mixed[3] or mixed[5], mixed[4] or mixed[6]
        if int(bottom) == 0:
            return None
        x = (int(whole) + Fraction(int(top), int(bottom))) * (-1 if sign else 1)
        return x * scale, unit, percent
    tree = parse(s)
    x = None if tree is None or variables(tree) else evaluate(tree, {})
    return None if x is None else (x * scale, unit, percent)


def _unit(words: list[str], anything: bool) -> str | None:
    """Canonical unit; None where a word is not one."""
    out = []
    for word in words:
        power = re.fullmatch(r"(.*?)\^?\(?([23]?)\)?\.?", word)
        name, exp = power[1], power[2]
        single = name[:-1] if len(name) > 2 and name.endswith("s") else name
        name = next(
            (n for n in (name, single, name[:-2]) if n in _UNITS), None if not anything else single
        )
        if word in ("square", "sq", "cubic", "/") or (
            word[0] == "/" and word[1:].rstrip("s") in _UNITS
        ):
            name = {"square": "^2", "sq": "^2", "cubic": "^3"}.get(word, word.rstrip("s"))
        if not name or word in _NOT_UNITS or word in _SCALES or (anything and len(word) < 3):
            return None
        if name[0] == "/":
            name = "/" + _ALIAS.get(name[1:], name[1:])
        out.append(_ALIAS.get(name, name) + (f" ^{exp}" if exp else ""))
    if len(out) > 4:
        return None
    return " ".join(sorted(" ".join(out).split()))


def _numbers(a: tuple, g: tuple, tol: float) -> bool:
    (x, ux, px), (y, uy, py) = a, g
    if ux and uy and ux != uy:
        return False
    if px != py:  # 50% against 0.5 or, the sign left out, against 50
        p, q = (x, y) if px else (y, x)
        return close(p / 100, q, tol) or close(p, q, tol)
    return close(x, y, tol)


# ---- math-verify


def tame(text: str, limit: int = MAX_LENGTH) -> bool:
    """Whether a symbolic package may read this text: short, shallow, no tower of powers, no big factorial."""
    depth = worst = 0
    for ch in text:
        depth += (ch in "([{") - (ch in ")]}")
        worst = max(worst, depth)
    wild = r"\^\s*\{?\s*-?\d{3,}|(?:\^|\*\*)[^\s,;+=]*(?:\^|\*\*)|\d{3,}\s*!|!\s*!|\\(?:int|sum|prod|lim|binom)|\d{60,}"
    return len(text) <= limit and worst <= MAX_DEPTH and not re.search(wild, text)


def math_verify(first: str, second: str, limit: int = MAX_LENGTH) -> bool:
    """The package's verdict on two texts, in its argument order (gold first), its clocks switched off.

    False where a text is not `tame` or the package gives up. Raises ImportError where it is missing.
    """
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its clocks are off
    if not (tame(first, limit) and tame(second, limit)):
        return False
    try:
        pair = [parse(s, parsing_timeout=None) for s in (first, second)]
        return bool(verify(*pair, timeout_seconds=None))
    except Exception:  # sympy raises whatever it likes on odd input
        return False


def _math_verify(answer: str, gold: str) -> bool:
    try:
        return math_verify(*(f"${s.strip().strip('$')}$" for s in (gold, answer)))
    except ImportError:
        raise UserError(
            "checker 'math_verify' needs that package; pip install math-verify, or take 'rules'"
        ) from None
