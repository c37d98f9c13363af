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
k kelvin
mol mole
acre
hectare
people person
way
square
student
point
"""
_NAMES = {name: line.split()[0] for line in _SPELLINGS.split("\n") for name in line.split()}
_JOINING = {"per", "square", "sq", "cubic", "cu"}
# What may follow a number without \text: single letters are variables there.
BARE_UNITS = {
    spelling
    for name in [*_NAMES, *_JOINING]
    if len(name) > 1 and name.isalpha()
    for spelling in (name, name + "s", name.capitalize(), name.capitalize() + "s")
} - {"in", "ins", "mi", "ml", "yd", "min", "mins", "rad"}
# Words that change the value, or say that the answer is another one.
_NOT_UNITS = set(
    "hundred thousand million billion trillion dozen half third quarter score squared cubed factorial"
    " and or not is the times plus minus over to mod base pi pair double twice infinity about".split()
)


def canonical(unit: str) -> str:
    """One spelling of a unit: `square inches` is `inch^2`, `km/h` is `kmh`."""
    names, power = [], ""
    for word in re.findall(r"[^\W\d]+|[%$€£¢^]|\d", unit.lower().replace("/", " per ")):
        if word in ("square", "sq", "cubic", "cu") and len(unit.split()) > 1:
            power = "^2" if word[0] == "s" else "^3"
        else:
            singular = word if word in _NAMES else word.removesuffix("s")
            names.append(_NAMES.get(singular, singular))
    text = (
        " ".join(names)
        .replace(" ^ ", "^")
        .removeprefix("^ ")
        .replace("deg c", "degc")
        .replace("deg f", "degf")
    )
    rates = {"km per h": "kmh", "mi per h": "mph"}
    return rates.get(text, text) + power


def same(prediction: str | None, reference: str | None) -> bool:
    """Whether the units of two equal numbers allow them to be equal; None: no unit is given.

    Given twice it must be the same one. An answer that adds a unit must add a known one; a
    reference may name anything (`5 apples`) that does not change the value.
    """
    if prediction is not None and reference is not None:
        return canonical(prediction) == canonical(reference)
    if prediction is None:
        return not _NOT_UNITS & set(re.findall(r"[a-z]+", (reference or "").lower()))
    names = [n for n in re.split(r"\^\d| ", canonical(prediction)) if n]
    return bool(names) and all(name in _NAMES.values() or name == "per" for name in names)
