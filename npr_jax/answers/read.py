r"""Answers as forms: what kind of thing a final answer is, and of what parts. See docs/answers.md.

`read` turns LaTeX or plain text into nested lists (they go to another process as JSON):

    ["expr", latex]                     numbers and formulas, in a small dialect of LaTeX
    ["word", latex]                     CAB: a product whose order counts
    ["based", digits, base]             52_8
    ["text", words]                     everything that is not understood, too
    ["unit", form, unit]                5 cm
    ["list", [form, ...]]               1, 2 and \{1, 2\}: not ordered
    ["(", "]", [form, ...]]             tuples and intervals: ordered, brackets count
    ["union", [form, ...]]              of intervals
    ["matrix", [[form, ...], ...]]
    ["named", name, form]               x = 5, x \in [1, 2], 1 < x < 2
    ["relation", op, latex, latex]      2x + y = 0, 2x \le y; op is =, < or <=

What holds anything beyond this is text, and equal only to the same text: an answer that is only
partly understood must not be taken for the part.
"""

import re
from fractions import Fraction

from npr_jax.answers.latex import FUNCTIONS, Unreadable, expression, plain, tokens
from npr_jax.answers.units import BARE_UNITS

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi "}
    | {"√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup "}
    | {"∈": r"\in ", "±": r"\pm ", "°": r"^\circ ", "²": "^2", "³": "^3", "“": '"', "”": '"'}
    | {"\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,", "’": "'", "\t": " ", "\n": " "}
)
_TEXT = ["mathrm", "mathbf", "mathit", "textbf", "textit", "textrm", "textnormal", "mbox", "hbox"]
_SIZES = ["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr"]
_SAME = {  # one spelling for each command
    **dict.fromkeys([*_TEXT, "operatorname"], "text"),
    **dict.fromkeys([*_SIZES, "displaystyle", "limits"], ""),
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], "frac"),
    **{"dbinom": "binom", "tbinom": "binom", "bar": "overline"},
    **{"leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "lt": "<", "gt": ">"},
    **{"lbrace": r"\{", "rbrace": r"\}", "quad": " ", "qquad": " ", "land": "and", "lor": "or"},
    "varnothing": "emptyset",
    **dict.fromkeys(["degree", "degrees", "textdegree"], r"^\circ "),
    **dict.fromkeys(["celsius", "degreeCelsius"], r"^\circ C"),
    **{"colon": ":", "mathbin": "", "mathrel": "", "mathord": "", "mathpunct": ""},
}
_NAME = re.compile(
    r"\(?(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})(?:_(?:\w|\{\w+\}))?'*(?:\((?:[\w, ]|\\cup)*\))?"
    r"(?:,\s*[a-zA-Z])*\)?"
)
_POWER = r"\s*(?:\^ ?\{?\d\}?)?"
_CIRC = r"\^ ?\{? ?\\circ ?\}?(?: ?(?:\\text ?\{[CF]\}|[CF]))?"
_DEGREES = re.compile(rf"(.*?[\d}})!])\s*({_CIRC}|\\?%)")
_TEXT_UNIT = re.compile(rf"(.*?\S)\s*(\\text ?\{{[^{{}}]*\}}{_POWER})")
_BARE_UNIT = re.compile(rf"(.*[\d}})])\s*([a-zA-Z][a-zA-Z /]+{_POWER})")
_WORD = re.compile(r"[A-Z](?: ?[A-Z])+")
# 3:00 p.m. is 3:00 PM; without points and a colon, 2am may be a product.
_HALF_DAY = re.compile(r"(?i)(?<=\d)\s*([ap])\. ?m\b\.?|(?<=:\d\d)\s*([ap])m\b")
_PLAIN = re.compile(r"([-+]?)([1-9]\d{0,2}(?:,\d{3})+|\d+)?(\.\d*)?(?:/(\d+))?")


def plain_number(text: str) -> Fraction | None:
    """The value of an integer, decimal (also `1.5e3`) or fraction of integers, with `,` for
    thousands or none."""
    text = plain(text)
    match = _PLAIN.fullmatch(text)
    if not match or not (match[2] or (match[3] or "")[1:]) or len(text) > 1000:
        return None
    sign, whole, decimals, divisor = match.groups(default="")
    if divisor and (decimals or not int(divisor)):
        return None
    value = Fraction((whole.replace(",", "") or "0") + (decimals if decimals != "." else ""))
    return (-value if sign == "-" else value) / int(divisor or 1)


def read(text: str) -> list:
    """The form of an answer. Raises nothing; see the module for the forms."""
    text = clean(text)
    try:
        return _read_list(text)
    except (Unreadable, RecursionError):
        return ["text", fold(words(text))]


def clean(text: str) -> str:
    """One spelling for what is written in several ways; wrappers and a final period fall away."""
    text = text.translate(_UNICODE).strip()
    if "matrix" in text:
        text = re.sub(r"(?:\\left)?[\[(]\s*\\begin\{matrix\}", r"\\begin{pmatrix}", text)
        text = re.sub(r"\\end\{matrix\}\s*(?:\\right)?[\])]", r"\\end{pmatrix}", text)
        text = text.replace(r"\\", r"\cr ")
    else:  # escaped once too often
        text = re.sub(r"\\{2}(?=[a-zA-Z])", r"\\", text)
    previous = None
    while text != previous:
        previous = text
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
            inside = text[len(start) : -len(end)]
            if (
                text.startswith(start)
                and text.endswith(end)
                and inside
                and start not in inside.replace(r"\$", "")
            ):
                text = inside.strip()
        if text.startswith(r"\boxed{") and text.endswith("}") and _spans(text[6:]):
            text = text[7:-1].strip()
        text = _without_end(text)
    text = re.sub(r"\{,\}|,\\!\s*", ",", text).replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ",", text)  # 8\,000
    text = re.sub(r"\\[,;: ]|(?<!\\)~", " ", text)
    text = re.sub(r"\\([a-zA-Z]+) ?", _respell, text)
    text = re.sub(r"\^ ?\{? ?\^\\circ ?\}?", r"^\\circ ", text)  # 90^\degree
    text = re.sub(r"(?<=[\w\s)])\{([:.])\}", r"\1", text)  # 3{:}30: braces for TeX's spacing
    text = re.sub(r"\\mathbb (\w)", r"\\mathbb {\1}", text)
    text = re.sub(r"(?<!\\)\{([^{}\\]*)\\choose ([^{}\\]*)\}", r"{\\binom {\1}{\2}}", text)
    text = re.sub(r"\\text ?\{([^{}]*)\}", _unwrap, text.strip())
    ordinal = r"(?<=\d) ?\^ ?(\{)? ?(\\text\{(?:st|nd|rd|th)\}) ?(?(1)\})"  # 17^{\text{th}}
    text = re.sub(ordinal, r"\2", text)
    text = re.sub(r"(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])(?![^{}]*\})", r"\\\1 ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=\d) ?([AaPp]\. ?[Mm])\.?$", r" \\text{\1}", text)


def _without_end(text: str) -> str:
    """Without a final period, or the bracket of a choice `D)`."""
    text = re.sub(r"(?<=[^.])\.$", "", text).strip()
    return re.sub(r"^([A-J])\)$", r"\1", text)


def _respell(match: re.Match[str]) -> str:
    name = match[1]
    new: str = _SAME.get(name, name)
    return "\\" + new + " " if new.isalpha() else new


def _unwrap(match: re.Match) -> str:
    inside = match[1].strip()
    if match[0] == match.string:
        inside = _without_end(inside)
    if re.fullmatch(r"[-+(]*([\d.,]+|[a-zA-Z])[)]*", inside):  # but a unit may be one letter
        after_number = re.search(r"[\d})]\s*$", match.string[: match.start()])
        if not (inside.isalpha() and after_number):
            return inside if inside.isdigit() else f" {inside} "
    return rf" \{inside} " if inside in ("and", "or") else rf" \text{{{inside}}} "


def words(text: str) -> str:
    r"""Cleaned text for comparison as text: without \text and needless blanks."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(and|or) ", r"\1 ", text)
    text = re.sub(r"\s*([^\w\s.,])\s*", r"\1", text).strip(' "')  # "3 .5" is not 3.5
    text = _HALF_DAY.sub(lambda half: f" {half[1] or half[2]}m".lower(), text)
    return re.sub(r"\s+", " ", text)


def fold(text: str) -> str:
    """Words without their case; whatever may be a formula keeps it."""
    return text.casefold() if re.fullmatch(r"(?:[^\W\d_]|[ .-])+", text) else text


def _spans(text: str) -> bool:
    """Whether one pair of brackets encloses all of a text."""
    try:
        return [d for _, d in tokens(text)].count(0) == 2 and text[:1] in "([{\\"
    except Unreadable:
        return False


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Parts and the separators between them, at the outermost level; no part may be empty."""
    parts, found = [""], []
    for token, depth in tokens(text):
        if depth == 0 and token in separators:
            if not parts[-1].strip() and found and found[-1] == "," and token in (r"\and", r"\or"):
                found[-1] = token  # "1, 2, and 3"
                continue
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise Unreadable(text)
    return parts, found


def _read_list(text: str, thousands: bool = True) -> list:
    if thousands and re.search(r"(?<![\d.])[1-9]\d{0,2}(,\d{3})+(?!\d)", text):
        text = _join_thousands(text)
    parts, separators = _split(text, {",", ";", r"\and", r"\or"})
    forms = [form for part in parts for form in _read_signs(part)]
    if len(forms) == 1:
        return forms[0]
    if separators and set(separators) == {r"\or"} and all(_is_interval(form) for form in forms):
        return ["union", forms]
    return ["list", forms]


def _join_thousands(text: str) -> str:
    """`12,345` is a number where no other is in the answer; in brackets the comma separates."""
    after = r"(?:\.\d*(?:\\overline ?\{?\d+\}?)?)?(?:[eE][-+]?\d+)?[^\d,()\[\]]*(?:\^ ?\{?\d\}?)?"
    number = re.fullmatch(rf"([^\d()\[\]]*?)(\d{{1,3}}(?:,\d{{3}})+)({after})", text)
    return number[1] + number[2].replace(",", "") + number[3] if number else text


def _is_interval(form: list) -> bool:
    form = form[2] if form[0] == "named" else form
    return form[0] in ("(", "[") and len(form[2]) == 2


def _read_signs(text: str) -> list[list]:
    r"""An item of a list; one with \pm stands for two."""
    found = [token for token, _ in tokens(text)]
    if not {r"\pm", r"\mp"} & set(found) or found[0] == r"\{":
        return [_read_item(text)]
    signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
    return [_read_item("".join(sign.get(token, token) for token in found)) for sign in signs]


def _read_item(text: str) -> list:
    if "=" in text or "<" in text or ">" in text or re.search(r"\\(le|ge|in|ne|cup)\b", text):
        parts, relations = _split(text, {"=", "<", ">", r"\le", r"\ge", r"\in"})
        if relations:
            return _read_relation(parts, relations)
        parts, _ = _split(text, {r"\cup"})
        if len(parts) > 1:
            return ["union", [_read_item(part) for part in parts]]
    matrix = re.fullmatch(r"\\begin ?\{([pb]matrix)\}(.*)\\end ?\{\1\}", text)
    if matrix and "begin" not in matrix[2]:
        rows = [row for row in matrix[2].split(r"\cr") if row.strip()]
        return ["matrix", [[_read_item(cell.strip()) for cell in row.split("&")] for row in rows]]
    if text.startswith("{") and _spans(text):
        return _read_list(text[1:-1], thousands=False)
    brackets = re.fullmatch(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", text)
    if brackets and _spans(text):
        opening, inside, closing = brackets.groups()
        if (opening == r"\{") != (closing == r"\}"):
            raise Unreadable(text)
        if opening == r"\{":
            form = _read_list(inside, thousands=False)
            return form if form[0] == "list" else ["list", [form]]
        parts, _ = _split(inside, {","})
        if len(parts) > 1:
            return [opening, closing, [_read_item(part) for part in parts]]
        if (opening, closing) == ("(", ")"):
            return _read_item(inside.strip())
        raise Unreadable(text)
    return _read_quantity(text)


def _read_relation(parts: list[str], relations: list[str]) -> list:
    if len(parts) == 2 and relations[0] in ("=", r"\in") and _NAME.fullmatch(parts[0]):
        return ["named", _read_name(parts[0]), _read_list(parts[1])]
    if any(relation in ("=", r"\in") for relation in relations) and relations != ["="]:
        raise Unreadable(parts)
    if relations[0] in (">", r"\ge"):  # turned round: 3 > x is x < 3
        parts, relations = parts[::-1], relations[::-1]
        relations = [{">": "<", r"\ge": r"\le"}.get(relation, "?") for relation in relations]
    if "?" in relations or {">", r"\ge"} & set(relations):
        raise Unreadable(parts)
    names = [i for i, part in enumerate(parts) if re.fullmatch(r"\\?[a-zA-Z]+", part)]
    bounds = [part for i, part in enumerate(parts) if i not in names]
    numeric = not re.search(r"(?<!\\)\b[a-zA-Z]|\d[a-zA-Z]", " ".join(bounds))
    if "=" not in relations and len(names) == 1 and len(parts) <= 3 and numeric:
        (at,) = names
        if len(parts) == 2 or at == 1:
            low = parts[at - 1] if at > 0 else r"-\infty"
            high = parts[at + 1] if at + 1 < len(parts) else r"\infty"
            opening = "[" if at > 0 and relations[at - 1] == r"\le" else "("
            closing = "]" if at + 1 < len(parts) and relations[at] == r"\le" else ")"
            return [
                "named",
                _read_name(parts[at]),
                [opening, closing, [_read_item(low), _read_item(high)]],
            ]
    if len(parts) != 2:
        raise Unreadable(parts)
    op = {r"\le": "<="}.get(relations[0], relations[0])
    return ["relation", op, *(expression(part) for part in parts)]


def _read_name(text: str) -> str:
    try:
        return expression(text)
    except Unreadable:
        return re.sub(r"[\s{}]|\\text", "", text)


def _read_quantity(text: str) -> list:
    """A number with a unit, with a base, or an expression."""
    based = re.fullmatch(r"([-+]?[0-9A-F]+)_ ?(?:\{\s*(\d+)\s*\}|(\d))", text)
    if based and based[1].strip("+-") and (based[1][-1].isdigit() or len(based[1]) > 1):
        return ["based", based[1].lstrip("+"), based[2] or based[3]]
    if sign := re.match(r"\\\$|[$€£]", text):
        return ["unit", ["expr", expression(text[sign.end() :].strip())], sign[0][-1]]
    unit = _DEGREES.fullmatch(text) or _TEXT_UNIT.fullmatch(text)
    bare = _BARE_UNIT.fullmatch(text)
    if not unit and bare and set(re.findall("[a-zA-Z]+", bare[2])) <= BARE_UNITS:
        unit = bare
    if unit and re.search(r"\d|\\pi", unit[1]) and not re.search("|".join(FUNCTIONS), unit[1]):
        name = re.sub(r"\\circ", "deg", unit[2])
        return ["unit", ["expr", expression(unit[1])], re.sub(r"\\text|[{}\\]", " ", name)]
    if text.lower() in ("yes", "no"):
        raise Unreadable(text)
    return ["word" if _WORD.fullmatch(text) else "expr", expression(text)]
