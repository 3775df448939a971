"""What every page has: one file, no external resource, readable on a light and on a dark ground."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #8a8f9855; --soft: #8a8f98; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       background: #fff; color: #1c1f24; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e3e6ea; } }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .left { text-align: left; } th { font-weight: 600; font-size: .85rem; }
.wide { font-size: .8rem; } .wide th { font-size: .75rem; } .wide td { white-space: nowrap; }
.wide th, .wide td { padding: .3rem .25rem; } .wide td:first-child { white-space: normal; }
tr.joint td { font-weight: 600; }
svg { width: 100%; height: auto; }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 ui-monospace, monospace;
           border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }
.passage span { border-radius: 3px; }
.less { text-decoration: underline dotted; text-underline-offset: 3px; }
.key { padding: .1rem .5rem; margin-right: .3rem; border-radius: 3px; font-size: .85rem;
       border: 1px solid var(--line); }
.soft { color: var(--soft); }
dt, dd { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace; }
dt { font-weight: 600; margin-top: 1.2rem; }
dd { margin: .4rem 0 .4rem 1.2rem; padding-left: .8rem; border-left: 2px solid var(--line); }
"""


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Writes a page of `sections`, each of them HTML; `title` is text."""
    page = (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
