"""Formulas of answers in a dialect of LaTeX that reads in one way only.

math-verify reads LaTeX generously: it ignores the case of letters, takes `s` for seconds, `x(3)`
for a function, `{3}{4}` for three plus four, and rounds decimals. Here decimals become fractions,
products get a `\\cdot`, arguments get braces, and every letter a symbol of its own.
"""

import re
from decimal import Decimal

FUNCTIONS = ["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan"]
FUNCTIONS += ["sinh", "cosh", "tanh", "log", "ln", "exp"]
_GREEK = ["alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"]
_GREEK += ["vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi"]
_GREEK += ["varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi"]
_GREEK += ["Sigma", "Phi", "Psi", "Omega"]
_FUNCTION_COMMANDS = {"\\" + name for name in FUNCTIONS}
_LETTER_COMMANDS = {"\\" + name for name in _GREEK}
_LETTER = re.compile(r"(\( )?(v _ \{ \d+ \}|e|I)( \))?")
_SIMPLE_FRACTION = re.compile(r"\\frac \{ \d+ \} \{ \d+ \}")
_OPERATORS = {"+": "+", "-": "-", "/": "/", "*": r"\cdot"} | {
    r"\cdot": r"\cdot",
    r"\times": r"\cdot",
    r"\div": "/",
}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]+|\S|\s+", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_OPEN, _CLOSE = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}
_PARTNER = {"(": ")", "{": "}", "|": "|"}
DEEPEST = 40  # nested brackets
# 2e-3 is 2e - 3 with Euler's number, unless a point, a lone 1 or a zero (2e-03) shows otherwise.
_SCIENTIFIC = re.compile(r"([-+]?) ?((?:\d+\.\d*|1|\d+(?=[eE](?:\d|[-+]0\d)))[eE][-+]?0*\d{1,3})")
_REPEATING = re.compile(r"([-+]?) ?(\d*)\.(\d*)\\overline ?(?:\{ ?(\d+) ?\}|(\d))")


class Unreadable(ValueError):
    """This is no formula, or none that could be read in one way only."""


def tokens(text: str) -> list[tuple[str, int]]:
    """(token, depth of brackets it is at) of a text whose brackets are closed; `)` may close `[`.

    Raises Unreadable where brackets are not closed, or nested deeper than DEEPEST.
    """
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


def plain(text: str) -> str:
    r"""A number in e-notation or with repeating digits spelled without them, exactly: `1.5e3` is
    `1500`, `0.1\overline{6}` is `15/90`. Any other text as it is."""
    if match := _SCIENTIFIC.fullmatch(text):
        return match[1] + format(Decimal(match[2]), "f")
    if match := _REPEATING.fullmatch(text):
        sign, whole, decimals, group, digit = match.groups(default="")
        once, period = whole + decimals, group or digit
        return (
            f"{sign}{int(once + period) - int(once or 0)}/{'9' * len(period)}{'0' * len(decimals)}"
        )
    return text


def expression(text: str) -> str:
    """A formula of numbers, letters, operators and common functions in the dialect.

    Raises Unreadable where anything else occurs.
    """
    text = plain(text)
    if re.search(r"\d[eE]\d", text):
        raise Unreadable(text)  # 1e5x: a power of ten, or of e
    if mixed := re.fullmatch(r"([-+]?) ?(\d+) (\d+)/(\d+)", text):  # 1 1/2
        text = r"{}{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    text = re.sub(r"(?<![a-zA-Z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![a-zA-Z\\])({'|'.join(FUNCTIONS)}|pi)(?![a-zA-Z])", r"\\\1 ", text)
    found = [token for token, _ in tokens(text)]
    return _formula([token for token in found if not token.isspace()])


def _formula(found: list[str]) -> str:
    rest, out = found[::-1], []  # a stack: the next token is the last
    after_number = False
    argument_of = ""  # the function whose argument goes on: \sin 2x is \sin(2x)
    while rest:
        token = rest[-1]
        if token in _OPERATORS:
            rest.pop()
            if token == "*" and rest and rest[-1] == "*":
                rest[-1] = "^"  # x**2
                continue
            if (not out or out[-1] in _OPERATORS.values()) and token not in "+-":
                raise Unreadable(token)
            out.append(_OPERATORS[token])
            argument_of = ""
        elif token in "!^":
            # Nor after another one: 2^3!, x^2^3.
            if not out or out[-1] in (*_OPERATORS.values(), argument_of, "!") or out[-1][0] == "^":
                raise Unreadable(token)
            rest.pop()
            out.append("!" if token == "!" else f"^ {{ {_argument(rest)} }}")
        elif token in _FUNCTION_COMMANDS:
            if out and not argument_of and out[-1] not in _OPERATORS.values():
                out.append(r"\cdot")
            argument_of = rest.pop()
            for mark in "_^":
                if rest and rest[-1] == mark:
                    rest.pop()
                    argument_of += f" {mark} {{ {_argument(rest)} }}"
            if not rest:
                raise Unreadable(token)
            out.append(argument_of)
        else:
            is_number = bool(_NUMBER.fullmatch(token))
            if is_number and (after_number or (out and _LETTER.fullmatch(out[-1]))):
                raise Unreadable(token)  # 1 000, or two answers; x2
            operand = _operand(rest)
            if (
                after_number
                and out[-1].isdigit()
                and re.fullmatch(r"\\frac \{ \d+ \} \{ \d+ \}", operand)
            ):  # 1\frac{4}{5}
                out[-1] = f"( {out[-1]} + {operand} )"
                after_number = False
                continue
            if out and out[-1] != argument_of and out[-1] not in _OPERATORS.values():
                if argument_of and operand[0] in "(|":
                    raise Unreadable(token)  # \sin x (y+1): where does the argument end?
                out += [] if argument_of else [r"\cdot"]
            out.append(operand)
            after_number = is_number
            continue
        after_number = False
    if not out or out[-1] in _OPERATORS.values():
        raise Unreadable("no formula")
    return " ".join(out)


def _operand(rest: list[str]) -> str:
    """Takes a number, letter, group, root or fraction off the stack."""
    token = rest.pop()
    if _NUMBER.fullmatch(token):
        if "." not in token:
            return token
        whole, decimals = token.split(".")
        return rf"( \frac {{ {whole}{decimals} }} {{ 1{'0' * len(decimals)} }} )"
    if token in _PARTNER:
        left, right = ("|", "|") if token == "|" else ("(", ")")
        return f"{left} {_group(rest, token)} {right}"
    if token in (r"\frac", r"\binom"):
        return rf"{token} {{ {_argument(rest, 1)} }} {{ {_argument(rest, 1)} }}"
    if token == r"\sqrt":
        degree = ""
        if len(rest) > 2 and rest[-1] == "[":
            _, digits, closing = rest.pop(), rest.pop(), rest.pop()
            if not digits.isdigit() or closing != "]":
                raise Unreadable(token)
            degree = f"[ {digits} ] "
        return rf"\sqrt {degree}{{ {_argument(rest)} }}"
    if token in (r"\pi", r"\infty"):
        return token
    if token.isalpha() and len(token) > 1:
        if len(token) > 3:  # a word
            raise Unreadable(token)
        rest.append(token[1:])
        token = token[0]
    if (token.isascii() and token.isalpha()) or token in _LETTER_COMMANDS:
        if rest and rest[-1] == "_":
            rest.pop()
            token += "_" + _argument(rest)
        elif token in "ei":
            return "e" if token == "e" else "( I )"  # of I ^ 2 math-verify drops the power
        return f"v _ {{ {int.from_bytes(token.encode(), 'big')} }}"
    raise Unreadable(token)


def _argument(rest: list[str], most_digits: int = 1000) -> str:
    r"""Takes an argument off the stack: a group or one operand; of the digits of a number at most
    `most_digits`. TeX takes one, but few who write \sqrt13 or 2^10 mean that."""
    if not rest:
        raise Unreadable("no argument")
    token = rest.pop()
    if token == "{":
        return _group(rest, token)
    if token == "-":
        return "- " + _argument(rest)
    if token.isdigit() and len(token) > most_digits:
        rest.append(token[most_digits:])
        token = token[:most_digits]
    if token.isalpha() and len(token) > 1:
        rest.append(token[1:])
        token = token[0]
    rest.append(token)
    return _operand(rest)


def _group(rest: list[str], opening: str) -> str:
    """Takes what is left of a group off the stack, with its end."""
    depth, group = 1, []
    while depth:
        if not rest:
            raise Unreadable(opening)
        token = rest.pop()
        depth += (token == opening != "|") - (token == _PARTNER[opening])
        group.append(token)
    return _formula(group[:-1])
