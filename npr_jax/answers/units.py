"""Names of units, so that `5 cm` is 5 centimeters, is not 5 metres, and may be given as 5."""

import re

_SPELLINGS = """
mm millimeter millimetre
cm centimeter centimetre
m meter metre
km kilometer kilometre
inch in inches
ft foot feet
yd yard
mi mile
mg milligram
g gram gm
kg kilogram
lb pound lbs
oz ounce
ton tonne
ml milliliter millilitre
l liter litre
gal gallon
s sec second
min minute
h hr hour
day
week
month
yr year
deg degree
degc celsius
degf fahrenheit
rad radian
dollar $ usd buck
euro €
gbp £
cent ¢
% percent percentage pct
mph
kmh kph kmph
unit
n newton
j joule
w watt
v volt
hz hertz
kelvin
mol mole
acre
hectare
people person
way
square
student
point
"""
_ORDINALS = ["th", "st", "nd", "rd"]
_NAMES = dict.fromkeys(_ORDINALS, "th") | {
    name: line.split()[0] for line in _SPELLINGS.split("\n") for name in line.split()
}
_JOINING = {"per", "square", "sq", "cubic", "cu"}
# What may follow a number without \text: single letters are variables there.
BARE_UNITS = {
    spelling
    for name in [*_NAMES, *_JOINING]
    if len(name) > 1 and name.isalpha() and name not in _ORDINALS
    for spelling in (name, name + "s", name.capitalize(), name.capitalize() + "s")
} - {"in", "ins", "mi", "ml", "yd", "min", "mins", "rad"}
# Words that change the value, or say that the answer is another one.
_SCALES = ["hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "third"]
_SCALES += ["quarter", "score", "squared", "cubed", "factorial", "pi", "infinity", "pair"]
_SCALES += ["double", "twice", "times", "plus", "minus", "over", "mod", "base"]
_NOT_UNITS = {*_SCALES, "and", "or", "not", "is", "the", "to", "about"}


def canonical(unit: str) -> str:
    """One spelling of a unit: `square inches` is `in^2`, `km/h` is `kmh`."""
    names, power = [], ""
    unit = re.sub(r"(?i)\b([ap])\. ?m\b\.?", r"\1m", unit)
    for word in re.findall(r"[^\W\d_]+|[%$€£¢^]|\d", unit.lower().replace("/", " per ")):
        if word in ("square", "sq", "cubic", "cu") and len(unit.split()) > 1:
            power = "^2" if word[0] == "s" else "^3"
        else:
            singular = word if word in _NAMES else word.removesuffix("s")
            names.append(_NAMES.get(singular, singular))
    text = " ".join(names).replace(" ^ ", "^").removeprefix("^ ")
    whole = {"km per h": "kmh", "mi per h": "mph", "deg c": "degc", "deg f": "degf"}
    return whole.get(text, text) + power


def same(prediction: str | None, reference: str | None) -> bool:
    """Whether the units of two equal numbers allow them to be equal; None: no unit is given.

    Given twice it must be the same one. An answer that adds a unit must add a known one; a
    reference may name anything (`5 apples`) that does not change the value.
    """
    if prediction is not None and reference is not None:
        return canonical(prediction) == canonical(reference)
    if prediction is None:
        found = re.findall(r"[^\W\d_]+", (reference or "").lower())
        return not any(w in _NOT_UNITS or (len(w) == 1 and w not in _NAMES) for w in found)
    names = [n for n in re.split(r"\^\d| ", canonical(prediction)) if n]
    return bool(names) and all(name in {*_NAMES.values(), "per"} for name in names)
