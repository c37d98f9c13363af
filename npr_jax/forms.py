r"""Answers as forms: what kind of thing a final answer is, and of what parts. See docs/answers.md.

`read` turns LaTeX or plain text into nested lists (they go to another process as JSON):

    ["expr", latex]                     numbers and formulas, in a small dialect of LaTeX
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

from npr_jax.units import BARE_UNITS

DEEPEST = 40  # nested brackets

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "°": r"^\circ "}
    | {"√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup "}
    | {"∈": r"\in ", "±": r"\pm ", "²": "^2", "³": "^3", "\u00a0": r"\,", "\u2009": r"\,"}
    | {"\u202f": r"\,", "“": '"', "”": '"', "’": "'", "\t": " ", "\n": " "}
)
_SAME = {  # one spelling for each command
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], "frac"),
    **dict.fromkeys(["leq", "leqslant"], "le"),
    **dict.fromkeys(["geq", "geqslant"], "ge"),
    **dict.fromkeys(["lbrace", "rbrace"], None),
    **dict.fromkeys(
        "mathrm mathbf mathit textbf textit textrm textnormal mbox hbox operatorname".split(), "text"
    ),
    **dict.fromkeys("left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle limits".split(), ""),
    **dict.fromkeys(["quad", "qquad"], " "),
    **{"lt": "<", "gt": ">", "land": "and", "lor": "or", "infin": "infty"},
}
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau"
    " phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split()
_COMMANDS = {"\\" + c for c in [*_FUNCTIONS, *_GREEK, *"frac sqrt pi cdot times div infty binom".split()]}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]+|\S|\s+", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_OPEN, _CLOSE = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}
_NAME = re.compile(
    r"\(?(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})(?:_(?:\w|\{\w+\}))?'*(?:\((?:[\w, ]|\\cup)*\))?"
    r"(?:,\s*[a-zA-Z])*\)?"
)
_PLAIN = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?(?:/(\d+))?")


class Unreadable(ValueError):
    """This is none of the forms: it is text."""


def plain_number(text: str) -> Fraction | None:
    """The value of an integer, decimal or fraction of integers, with `,` for thousands or none."""
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
        return ["text", words(text)]


def clean(text: str) -> str:
    """One spelling for what is written in several ways; wrappers and a final period fall away."""
    text = text.translate(_UNICODE).strip()
    if "matrix" in text:
        text = text.replace(r"\\", r"\cr ")
    else:  # escaped once too often
        text = re.sub(r"\\{2}(?=[a-zA-Z])", r"\\", text)
    previous = None
    while text != previous:
        previous = text
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
            inside = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and inside and start not in inside:
                text = inside.strip()
        if text.startswith(r"\boxed{") and text.endswith("}") and _spans(text[6:]):
            text = text[7:-1].strip()
        text = re.sub(r"(?<=[^.])\.$", "", text).strip()
    text = re.sub(r"\{,\}|,\\!\s*", ",", text).replace(r"\!", "")
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ",", text)  # 8\,000
    text = re.sub(r"\\[,;: ]|(?<!\\)~", " ", text)
    text = re.sub(r"\\([a-zA-Z]+) ?", _respell, text)
    text = re.sub(r"\\text ?\{([^{}]*)\}", _unwrap, text)
    text = re.sub(r"(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])(?![^{}]*\})", r"\\\1 ", text)
    return re.sub(r"\s+", " ", text).strip()


def _respell(match: re.Match) -> str:
    name = match[1]
    new = _SAME.get(name, name)
    if new is None:
        return {"lbrace": r"\{", "rbrace": r"\}"}[name]
    return "\\" + new + " " if new.isalpha() else new


def _unwrap(match: re.Match) -> str:
    inside = match[1].strip()
    if re.fullmatch(r"[-+(]*([\d.,]+|[a-zA-Z])[)]*", inside):  # but a unit may be one letter
        after_number = re.search(r"[\d})]\s*$", match.string[: match.start()])
        if not (inside.isalpha() and after_number):
            return inside if inside.isdigit() else f" {inside} "
    return rf" \{inside} " if inside in ("and", "or") else rf" \text{{{inside}}} "


def words(text: str) -> str:
    r"""Cleaned text for comparison as text: without \text, blanks and the case of words."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(and|or) ", r"\1 ", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text).strip(" .\"'")
    text = re.sub(r"\s+", " ", text)
    return text.casefold() if re.fullmatch(r"[^\W\d_][^\\\d]+", text) else text


def _tokens(text: str) -> list[tuple[str, int]]:
    """(token, depth of brackets it is at) of a text whose brackets are closed; `)` may close `[`."""
    found, depth = [], 0
    for token in _TOKEN.findall(text):
        depth -= token in _CLOSE
        found.append((token, depth))
        depth += token in _OPEN
        if not 0 <= depth <= DEEPEST:
            raise Unreadable(text)
    if depth:
        raise Unreadable(text)
    return found


def _spans(text: str) -> bool:
    """Whether one pair of brackets encloses all of a text."""
    try:
        return [d for _, d in _tokens(text)].count(0) == 2 and text[:1] in "([{\\"
    except Unreadable:
        return False


def _split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """(parts, separators between them) at the outermost level. Raises Unreadable at an empty part."""
    parts, found = [""], []
    for token, depth in _tokens(text):
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
    """`12,345` is a number where nothing else is in the answer; in brackets the comma separates."""
    number = re.fullmatch(r"([^\d()\[\]]*?)(\d{1,3}(?:,\d{3})+)((?:\.\d+)?[^\d,()\[\]]*(?:\^ ?\{?\d\}?)?)", text)
    return number[1] + number[2].replace(",", "") + number[3] if number else text


def _is_interval(form: list) -> bool:
    form = form[2] if form[0] == "named" else form
    return form[0] in ("(", "[") and len(form[2]) == 2


def _read_signs(text: str) -> list[list]:
    r"""An item of a list; one with \pm stands for two."""
    tokens = [token for token, _ in _tokens(text)]
    if not {r"\pm", r"\mp"} & set(tokens) or tokens[0] == r"\{":
        return [_read_item(text)]
    signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
    return [_read_item("".join(sign.get(token, token) for token in tokens)) for sign in signs]


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
    brackets = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text)
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
        return ["named", re.sub(r"[\s{}]|\\text", "", parts[0]), _read_list(parts[1])]
    if any(relation in ("=", r"\in") for relation in relations) and relations != ["="]:
        raise Unreadable(parts)
    if relations[0] in (">", r"\ge"):  # turned round: 3 > x is x < 3
        parts, relations = parts[::-1], relations[::-1]
        relations = [{">": "<", r"\ge": r"\le"}.get(relation, "?") for relation in relations]
    if "?" in relations or {">", r"\ge"} & set(relations):
        raise Unreadable(parts)
    names = [i for i, part in enumerate(parts) if re.fullmatch(r"\\?[a-zA-Z]+", part)]
    if "=" not in relations and len(names) == 1 and len(parts) <= 3:
        (at,) = names
        if len(parts) == 2 or at == 1:
            low = parts[at - 1] if at > 0 else r"-\infty"
            high = parts[at + 1] if at + 1 < len(parts) else r"\infty"
            opening = "[" if at > 0 and relations[at - 1] == r"\le" else "("
            closing = "]" if at + 1 < len(parts) and relations[at] == r"\le" else ")"
            return ["named", parts[at], [opening, closing, [_read_item(low), _read_item(high)]]]
    if len(parts) != 2:
        raise Unreadable(parts)
    op = {r"\le": "<="}.get(relations[0], relations[0])
    return ["relation", op, *(expression(part) for part in parts)]


def _read_quantity(text: str) -> list:
    """A number with a unit, with a base, or an expression."""
    based = re.fullmatch(r"([-+]?[0-9A-F]+)_ ?(?:\{\s*(\d+)\s*\}|(\d))", text)
    if based and based[1].strip("+-") and (based[1][-1].isdigit() or len(based[1]) > 1):
        return ["based", based[1].lstrip("+"), based[2] or based[3]]
    if text.startswith((r"\$", "$", "€", "£")):
        sign = re.match(r"\\?[$€£]", text)[0]
        return ["unit", ["expr", expression(text[len(sign) :].strip())], sign[-1]]
    unit = re.fullmatch(r"(.*?[\d})!])\s*(\^ ?\{? ?\\circ ?\}?(?: ?(?:\\text ?\{[CF]\}|[CF]))?|\\?%)", text)
    if not unit:
        unit = re.fullmatch(r"(.*?\S)\s*(\\text ?\{[^{}]*\}\s*(?:\^ ?\{?\d\}?)?)", text)
    if not unit and (bare := re.fullmatch(r"(.*[\d})])\s*([a-zA-Z][a-zA-Z /]+(?:\^ ?\{?\d\}?)?)", text)):
        if set(re.findall("[a-zA-Z]+", bare[2])) <= BARE_UNITS:
            unit = bare
    if unit and re.search(r"\d|\\pi", unit[1]) and not re.search("|".join(_FUNCTIONS), unit[1]):
        name = re.sub(r"\\(text|circ)|[{}\\]", lambda m: "deg" if m[0] == r"\circ" else " ", unit[2])
        return ["unit", ["expr", expression(unit[1])], name]
    return ["expr", expression(text)]


def expression(text: str) -> str:
    """A formula in a dialect that reads in one way: exact numbers, arguments in braces.

    Raises Unreadable where anything but numbers, single letters, Greek letters, operators and the
    common functions occurs.
    """
    mixed = re.fullmatch(r"([-+]?) ?(\d+) (\d+)/(\d+)", text)
    if mixed:
        text = rf"{mixed[1]}\frac{{{mixed[2]}*{mixed[4]}+{mixed[3]}}}{{{mixed[4]}}}"
    text = re.sub(r"(?<![a-zA-Z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![a-zA-Z\\])({'|'.join(_FUNCTIONS)}|pi)(?![a-zA-Z])", r"\\\1 ", text)
    tokens = [token for token, _ in _tokens(re.sub(r"_ ?(\w)", r"_{\1}", text))]
    for before, blank, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if blank.isspace() and _NUMBER.fullmatch(before) and _NUMBER.fullmatch(after):
            raise Unreadable(text)  # 1 000, or two answers
    out = _formula([token for token in tokens if not token.isspace()])
    if not out:
        raise Unreadable(text)
    return " ".join(out)


def _formula(tokens: list[str]) -> list[str]:
    out: list[str] = []
    rest = tokens[::-1]  # a stack, the next token last
    while rest:
        token = rest.pop()
        if token in (r"\frac", r"\binom"):
            top, bottom = _argument(rest), _argument(rest)
            whole = out[-1] if out and out[-1].isdigit() and out[-2:-1] not in (["^"], ["_"]) else ""
            if token == r"\frac" and whole and (top + bottom).isdigit():  # 1\frac{4}{5}
                out[-1:] = ["(", whole, "+", token, "{", top, "}", "{", bottom, "}", ")"]
            else:
                out += [token, "{", top, "}", "{", bottom, "}"]
        elif token == r"\sqrt":
            out.append(token)
            if rest and rest[-1] == "[":
                end = rest[::-1].index("]") if "]" in rest else len(rest)
                degree = "".join(rest.pop() for _ in range(min(end + 1, len(rest))))[1:-1]
                if not degree.isdigit():
                    raise Unreadable(token)
                out += ["[", degree, "]"]
            out += ["{", _argument(rest, digits=True), "}"]
        elif _NUMBER.fullmatch(token):
            out += _number(token)
        elif token.isalpha():
            if len(token) > 3:
                raise Unreadable(token)
            out += token
        elif token == "*":
            out += "*" if not (rest and rest[-1] == "*") else "^"
            if out[-1] == "^":
                rest.pop()
        elif token in "^_":
            out += [token, "{", _argument(rest, digits=True), "}"]
        elif token in _COMMANDS or token in "+-/(){}!|":
            out.append({r"\div": "/", r"\times": r"\cdot"}.get(token, token))
        else:
            raise Unreadable(token)
    return out


def _argument(rest: list[str], digits: bool = False) -> str:
    r"""Takes an argument off the stack: a group, or one token; of a number only its first digit,
    as TeX does, unless `digits`: few who write \sqrt13 mean 3."""
    if not rest:
        raise Unreadable("no argument")
    token = rest.pop()
    if token == "{":
        depth, group = 1, []
        while depth:
            group.append(rest.pop())
            depth += {"{": 1, "}": -1}.get(group[-1], 0)
        return " ".join(_formula(group[:-1])) or "("  # nothing is no argument: it does not parse
    if token.isdigit() or token.isalpha():
        if len(token) > 1 and not (digits and token.isdigit()):
            rest.append(token[1:])
            token = token[0]
        return token
    return " ".join(_formula([token]))


def _number(token: str) -> list[str]:
    if "." not in token:
        return [token]
    whole, decimals = token.split(".")
    return ["(", r"\frac", "{", whole + decimals, "}", "{", "1" + "0" * len(decimals), "}", ")"]
