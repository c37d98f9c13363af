"""The page at `/`: a question, and the tree that grows. It fetches nothing from anywhere else.

Its style and its script stand in it: the report's viewer, and what asks the server. The policy
allows just these two by their hashes, and no text ever becomes HTML or a script.
"""

import base64
import functools
import hashlib
from importlib.resources import files

from starlette.responses import HTMLResponse

_PARTS = {
    "/*style*/": ("report/viewer.css", "serve/page.css"),
    "/*script*/": ("report/trace.js", "report/answer.js", "serve/page.js"),
}


def page() -> HTMLResponse:
    """The page, and the policy that a browser keeps it to."""
    text, headers = _page()
    return HTMLResponse(text, headers=headers)


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    found = _text("serve/page.html")
    hashes = []
    for mark, names in _PARTS.items():
        part = "".join(map(_text, names))
        assert found.count(mark) == 1 and "</s" not in part, names
        found = found.replace(mark, part)
        hashes.append(base64.b64encode(hashlib.sha256(part.encode()).digest()).decode())
    style, script = hashes
    policy = (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = {"content-security-policy": policy, "cache-control": "no-cache"}
    headers |= {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return found, headers


def _text(name: str) -> str:
    return files("npr_jax").joinpath(name).read_text(encoding="utf-8")
