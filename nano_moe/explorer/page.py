"""The page as one string: markup, style and scripts of `page/`, and the documents it opens with.

Nothing is fetched to show it, neither from here nor from anywhere else: its policy names each
script by its hash, and allows no connection but, where there is a server, to that server.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCRIPTS = (
    "core.js",
    "tokens.js",
    "inspector.js",
    "expert.js",
    "route.js",
    "compute.js",
    "balance.js",
    "specialization.js",
    "generate.js",
    "main.js",
)
MARK = '<meta name="generator" content="nano_moe report-html">'  # of every file that we write


def html(documents: Mapping[str, Any], *, live: bool) -> str:
    """The whole page; `documents` as in `contract.py`."""
    style, scripts = _read("style.css"), [_read(name) for name in SCRIPTS]
    server = "'self'" if live else "'none'"
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "img-src data:",
            f"connect-src {server}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    head = [
        MARK,
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<style>{style}</style>",
    ]
    foot = [f'<script type="application/json" id="documents">{embedded(documents)}</script>']
    foot += [f"<script>{script}</script>" for script in scripts]
    page = _read("index.html")
    return page.replace("<!-- head -->", "\n".join(head)).replace("<!-- foot -->", "\n".join(foot))


def embedded(content: Any) -> str:
    """JSON that can stand in a page: no character of it can end the element that holds it."""
    text = dumped(content)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def dumped(content: Any) -> str:
    """JSON in ASCII; raises ValueError for numbers that are not finite."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
