r"""Key steps for StepRAR (R1-VL, arXiv:2503.12937): extract, import, clean, check.

The authors ask GPT-4o three times: extract the key steps of a solution, compress each to a few core words,
add equivalent surface forms. Only their first prompt is public. Here the same three passes are rules, which
need no network (`extract`, `surface_forms`); `PROMPTS` holds prompts of our own for a language model, and
`parse_reply` reads what it answers. `clean` repairs either.

    \frac{6}{3}=2  |  6/3 = 2  |  6 divided by 3 equals 2
    AD is a median  |  median is AD
    AE is half of AD  |  AE=1/2AD

A record's `key_steps` is {"Steps": [group, ...]}, a group one string or a list of equivalent strings.

    python -m jaxrepro.methods.stepgrpo.key_steps IN.jsonl OUT.jsonl [--keep_short] [--no_forms] [--prompts]
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.data import stepformat as fmt
from jaxrepro.data.stepwise import check_key_steps, read_objects, write_objects
from jaxrepro.methods.stepgrpo.rewards import alternatives, occurs

MIN_CHARS = 2
MAX_WORDS = 3  # of each side of "a is b"
MAX_CHARS = 60  # of an equation

PROMPTS = {
    "extract": (
        "Below are a question and a worked solution. Collect the elements that any correct solution must "
        "mention, copied word for word.\n"
        "- From the image description: up to 3 objects or numbers.\n"
        "- From the rationale: the concepts it relies on.\n"
        "- From each step: variables, equations, relations, intermediate results.\n"
        "Write equations whole and other phrases in 3 words or fewer. List nothing twice, also not in "
        'different sections. Leave out the line "Let\'s think step by step" and the final answer.\n'
        "Reply in this shape and write nothing else:\n"
        "Key Elements:\n"
        "Image Description: [a, b]; Rationales: [c]; Step 1: [d, e], Step 2: [f]\n\n"
        "Question: {question}\n\nSolution:\n{solution}"
    ),
    "compress": (
        "Shorten each element of the lists below to the few words or symbols that carry its meaning. Keep "
        "equations whole, keep order, sections and shape.\n\n{reply}"
    ),
    "augment": (
        "Replace each element x of the lists below by a list [x, y, z] of itself and other ways to write "
        "the same thing: LaTeX, plain symbols, words, operands swapped where the meaning stays. Keep order, "
        "sections and shape.\n\n{reply}"
    ),
}


# ---- pass 1 and 2: extract short elements


def extract(
    solution: str, question: str = "", *, min_chars: int = MIN_CHARS, forms: bool = True
) -> dict[str, Any]:
    """Key steps of a solution in the format of data/stepformat.py, by rules: equations, `a is b`, lone numbers.

    The first string of each group occurs in the solution's steps. `forms` adds equivalent surface forms.
    Raises UserError where the text has no steps.
    """
    steps = fmt.STEP_BLOCK.findall(solution)
    if not steps:
        raise UserError(f"solution has no '### Step n:' block; it starts with {solution[:40]!r}")
    found = [element for step in steps for element in _elements(step)]
    groups = [surface_forms(x) if forms else [x] for x in found]
    return clean({"Steps": groups}, question, min_chars=min_chars)


_CLAUSE = re.compile(
    r"[;\n!?]|(?<!\d),|,(?!\d)|\.(?=\s|$)|:\s|\$\$?|\\[()\[\]]"
    r"|(?<![A-Za-z\\])(?:so|thus|hence|therefore|then|since|because|and|but|while|where|we have|we get|which)(?![A-Za-z])",
    re.IGNORECASE,
)
_IS = re.compile(
    r"(?:the |an? )?(?P<a>[^\s=]+(?: [^\s=]+)*?) (?P<verb>is|are|equals) (?P<article>the |an? )?(?P<b>[^\s=]+(?: [^\s=]+)*)",
    re.IGNORECASE,
)
_ALONE = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?%?(?![\w])(?!\.\d)")
_PRONOUNS = ("it", "there", "this", "that", "they", "these", "what", "answer")
_PROSE = re.compile(r"(?!(?:sin|cos|tan|log|ln|sqrt|pi|frac)\b)[a-z]{2,}|[A-Z][a-z]+", re.ASCII)


def _elements(step: str) -> list[str]:
    out = []
    for clause in (c.strip(" .,") for c in _CLAUSE.split(step)):
        if "=" in clause:
            equation = _strip_prose(clause)
            sides = [s.strip() for s in equation.split("=")]
            if all(sides) and len(equation) <= MAX_CHARS:
                out.append(equation)
            elif all(sides):  # a long chain: neighbours
                pairs = re.findall(r"(?=(?:^|=)([^=]+=[^=]+))", equation)
                out += [p.strip() for p in pairs if len(p.strip()) <= MAX_CHARS]
        elif m := _IS.fullmatch(clause):
            if m["a"].lower() not in _PRONOUNS and all(
                len(m[k].split()) <= MAX_WORDS for k in "ab"
            ):
                out.append(clause[m.start("a") :])
            else:
                out += _ALONE.findall(clause)
        else:
            out += _ALONE.findall(clause)
    return [x for x in out if _balanced(x)]


def _balanced(s: str) -> bool:
    return all(s.count(a) == s.count(b) for a, b in ("()", "[]", "{}"))


def _strip_prose(clause: str) -> str:
    """The equation in a clause: words before and after it go, names of points and LaTeX stay."""
    words = clause.split(" ")
    eq = next(i for i, w in enumerate(words) if "=" in w)
    last = max(i for i, w in enumerate(words) if "=" in w)

    def prose(w):
        return _PROSE.fullmatch(w.strip("(),.")) is not None

    start = eq
    while start > 0 and not prose(words[start - 1]):
        start -= 1
    if start == eq and words[eq].startswith("="):  # "the area = 5": keep the name
        start = max(0, eq - 1)
    stop = last + 1
    while stop < len(words) and not prose(words[stop]):
        stop += 1
    if stop == last + 1 and words[last].endswith("="):
        stop = min(len(words), last + 2)
    return " ".join(words[start:stop])


# ---- pass 3: equivalent surface forms

_TO_PLAIN = [
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", lambda m: f"{_wrap(m[1])}/{_wrap(m[2])}"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\\cdot|\\times|[×·]", "*"),
    (r"\\div|÷", "/"),
    (r"\^\s*\{?\\circ\}?|\\degree", "°"),
    (r"\^\{(\w+)\}", r"^\1"),
    (r"\\(?:left|right|,|;|!)", ""),
    (r"\\%", "%"),
    (r"\\(angle|triangle|pi|theta|alpha|beta)\b ?", r"\1 "),
    (r"[−–]", "-"),
]
_OPERATORS = {"*": "times", "/": "divided by", "+": "plus", "-": "minus", "=": "equals"}
_TOP = r"[\w.°%]+|\([^()]*\)"
_BOTTOM = r"\d+(?:\.\d+)?|[A-Za-z]\w*|\([^()]*\)"  # 1/2AD is half of AD


def surface_forms(element: str) -> list[str]:
    """The element followed by other ways to write it; matching ignores case, so none differs by case only."""
    out = [element]
    plain = _plain(element)
    if "=" in plain:
        out += _equation_forms(plain)
        half = re.fullmatch(r"(\w+) ?= ?1/2 ?\*? ?(\w+)", plain)
        if half and not half[2].isdecimal():
            out.append(f"{half[1]} is half of {half[2]}")
        value = re.fullmatch(r"([A-Za-z][\w ]*?) ?= ?([\w.%°/-]+)", plain)
        if value:
            out.append(f"{value[1]} is {value[2]}")
    elif m := _IS.fullmatch(plain):
        a, article, b = m["a"], m["article"], m["b"]
        half = re.fullmatch(r"half (?:of )?(\w+)", b)
        if half:
            out += [f"{a}=1/2{half[1]}", f"{a} = 1/2 {half[1]}", rf"{a} = \frac{{1}}{{2}}{half[1]}"]
            out.append(f"{a} is half {half[1]}" if " of " in b else f"{a} is half of {half[1]}")
        elif article:
            out += [f"{b} is {a}", f"{a} is {b}", f"{a} is {article}{b}"]
        elif re.search(r"\d", b) or re.fullmatch(r"[A-Za-z]{1,3}", b):
            out += [f"{a} = {b}", f"{a}={b}", f"{a} equals {b}", f"{a} is {b}"]
        else:
            out.append(f"{b} is {a}")
    unique: dict[str, str] = {}
    for form in (re.sub(r"\s+", " ", s).strip() for s in out[1:]):
        unique.setdefault(form.lower(), form)
    unique.pop(element.lower(), None)
    return [element, *unique.values()]


def _plain(s: str) -> str:
    for pattern, to in _TO_PLAIN:
        s = re.sub(pattern, to, s)
    return re.sub(r"\s+", " ", s).strip()


def _wrap(s: str) -> str:
    return s if re.fullmatch(r"[\w.]+", s.strip()) else f"({s})"


def _equation_forms(plain: str) -> list[str]:
    tight = re.sub(r"(?<=\W) (?=\w)|(?<=\w) (?=\W)|(?<=\W) (?=\W)", "", plain)
    spaced = re.sub(r"(?<=[\w)%°])([=*/+-])(?=[\w(\\-])", r" \1 ", tight)
    latex = re.sub(rf"({_TOP})/({_BOTTOM})", _frac, tight).replace("*", r" \times ")
    words = re.sub(r" ([=*/+-]) ", lambda m: f" {_OPERATORS[m[1]]} ", spaced)
    out = [tight.replace("=", " = "), tight, spaced, latex.replace("=", " = "), latex]
    if not re.search(r"/ ?\d+[A-Za-z(]", plain):  # "1 divided by 2AD" would mean something else
        out.append(words)
    if "*" in tight:
        out += [spaced.replace("*", "×"), tight.replace("*", "×")]
    if "/" in tight:
        out.append(spaced.replace("/", "÷"))
    return out


def _frac(m: re.Match) -> str:
    top, bottom = (s[1:-1] if s.startswith("(") else s for s in m.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


# ---- import of replies

_SECTION = re.compile(r"(Image Description|Rationales?|Step (\d+))\s*:\s*(?=\[)", re.IGNORECASE)


def parse_reply(reply: str) -> dict[str, list]:
    """Read "Key Elements: Image Description: [..]; Rationales: [..]; Step 1: [..], Step 2: [..]".

    An element may itself be a list of equivalent forms. Brackets inside elements must be balanced;
    quotes around elements are dropped. Raises UserError where no step list is found or one never closes.
    """
    out: dict[str, list] = {"Image Description": [], "Rationales": [], "Steps": []}
    at = 0
    while m := _SECTION.search(reply, at):
        items, at = _list(reply, m.end())
        name = "Steps" if m[2] else m[1].title()
        out["Rationales" if name == "Rationale" else name] += items
    if not out["Steps"]:
        raise UserError(f"reply has no 'Step n: [..]' list; it starts with {reply.strip()[:60]!r}")
    return out


def _list(s: str, start: int, level: int = 1) -> tuple[list, int]:
    """Items of the bracketed list that opens at `start`, and the index after it."""
    if level > 2:
        raise UserError(
            f"reply nests lists too deep: {s[:60]!r}; an element is a string or one list of forms"
        )
    items, depth, begin, quote = [], 0, start + 1, ""
    for i in range(start, len(s)):
        ch, fresh = s[i], not s[begin:i].strip()
        if quote:
            ends = s[i + 1 :].lstrip()[:1] in ("", ",", "]")
            quote = "" if ch == quote and ends else quote
        elif ch in "\"'“" and fresh and depth == 1:
            quote = "”" if ch == "“" else ch
        elif ch in "([{":
            depth += 1
        elif ch in ")]}":
            depth -= 1
        if (depth == 0 or (depth == 1 and ch == ",")) and not quote:
            item = s[begin:i].strip()
            if item.startswith("[") and item.endswith("]"):
                items.append(_list(item, 0, level + 1)[0])
            elif item:
                items.append(item.strip("\"'“”").strip())
            begin = i + 1
            if depth == 0:
                return items, i + 1
    raise UserError(f"reply has a list that never closes: {s[start : start + 60]!r}")


# ---- cleaning


def clean(key_steps: Any, question: str = "", *, min_chars: int = MIN_CHARS) -> dict[str, Any]:
    """Drop what earns no credit: empty and short strings, and groups that repeat the question or another group.

    A group goes where one of its forms stands in the question, or was in an earlier group; case and
    spaces make no difference. Other keys than "Steps" stay, a missing "Steps" becomes []. `min_chars` = 1
    keeps single characters, such as one-digit results. Raises UserError where it is no dict, or holds
    something else than texts.
    """
    key_steps = check_key_steps(key_steps, needed=False, empty=True)
    said, seen, groups = _fold(question), set(), []
    for group in key_steps["Steps"]:
        forms = [k.strip() for k in alternatives(group)]
        forms = [k for k in dict.fromkeys(forms) if len(_squeeze(k)) >= max(1, min_chars)]
        names = {_squeeze(k) for k in forms}
        told = any(occurs(_fold(k), said, matcher="token_boundary") for k in forms)
        if forms and not told and not seen & names:
            groups.append(forms)
        seen |= names
    return {**key_steps, "Steps": groups}


def _squeeze(key: str) -> str:
    return re.sub(r"\s", "", key).lower()


def _fold(text: str) -> str:
    return re.sub(r"\s+", " ", text).lower()


# ---- command line


def annotate(record: Mapping, *, min_chars: int = MIN_CHARS, forms: bool = True) -> dict:
    """The record with cleaned key_steps: its own where any are left, else of its "reply", else of its "solution"."""
    question = record.get("problem", "")
    for field in ("problem", "solution", "reply"):
        if not isinstance(record.get(field, ""), str):
            raise UserError(f"{field} is a {type(record[field]).__name__}; it must be a string")
    own = record.get("key_steps")
    own = None if own is None else clean(own, question, min_chars=min_chars)
    if own and own["Steps"]:
        return {**record, "key_steps": own}
    if "reply" in record:
        found = parse_reply(record["reply"])
        if forms:
            found["Steps"] = [surface_forms(g) if isinstance(g, str) else g for g in found["Steps"]]
    elif "solution" in record:
        found = extract(record["solution"], question, min_chars=min_chars, forms=forms)
    elif own is not None:
        found = own
    else:
        raise UserError("record has none of key_steps, reply, solution; give one")
    return {**record, "key_steps": clean(found, question, min_chars=min_chars)}


def convert(records: Iterable[tuple[str, Mapping]], **options: Any) -> tuple[list[dict], list[str]]:
    """Annotated records, and "file:line: what is wrong" of those that cannot be."""
    out, errors = [], []
    for where, record in records:
        try:
            out.append(annotate(record, **options))
        except UserError as e:
            errors.append(f"{where}: {e}")
    return out, errors


def prompts(record: Mapping) -> dict[str, str]:
    """The three prompts of a record; {reply} in the last two stands for the reply to the one before."""
    fields = {
        k: str(record.get(v, ""))
        for k, v in (("{question}", "problem"), ("{solution}", "solution"))
    }
    filled = re.sub("|".join(fields), lambda m: fields[m[0]], PROMPTS["extract"])
    return {**PROMPTS, "extract": filled}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on what is wrong."""
    p = argparse.ArgumentParser(
        prog="key_steps", description="Add key steps to the records of a JSONL file."
    )
    p.add_argument("source", help="records with problem, and solution or reply (a model's answer)")
    p.add_argument("target", help="the same records with key_steps; replaced as a whole")
    p.add_argument("--keep_short", action="store_true", help="keep single characters")
    p.add_argument("--no_forms", action="store_true", help="do not add equivalent surface forms")
    p.add_argument(
        "--prompts", action="store_true", help="write prompts for a language model instead"
    )
    a = p.parse_args(argv)
    try:
        source, broken = read_objects(a.source)
        if a.prompts:
            records = [{"id": r.get("id", i), **prompts(r)} for i, (_, r) in enumerate(source)]
            note = "with prompts"
        else:
            min_chars = 1 if a.keep_short else MIN_CHARS
            records, refused = convert(source, min_chars=min_chars, forms=not a.no_forms)
            broken += refused
            note = f"{sum(not r['key_steps']['Steps'] for r in records)} without key steps"
        if broken and (not records or Path(a.target).resolve() == Path(a.source).resolve()):
            raise UserError(broken[0])  # nothing is written, so that no record is lost
        write_objects(a.target, records)
    except (UserError, OSError) as e:
        message = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else str(e)
        print(f"error: {message}", file=sys.stderr)
        return 2
    for message in broken:
        print(f"left out: {message}", file=sys.stderr)
    print(f"{len(records)} records, {note} -> {a.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
