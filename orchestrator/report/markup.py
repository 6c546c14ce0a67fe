"""What the page is made of: pieces of HTML, numbers as text, and the style sheet."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def document(title: str, body: str) -> str:
    """A whole page that loads nothing and runs nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{CSS}</style></head><body>
{body}</body></html>
"""


def figure(title: str, content: str) -> str:
    """A chart under its caption."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def folded(title: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def legend(colours: Mapping[str, str]) -> str:
    """Names beside their CSS colours."""
    item = '<li><i style="background:{}"></i>{}</li>'.format
    items = [item(colour, escape(name)) for name, colour in colours.items()]
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(head: Sequence[str], align: str, rows: Iterable[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """A table whose columns lean left or right as the letters of ``align`` say."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = [' class="r"' if letter == "r" else "" for letter in align]
        return "".join(f"<{tag}{side}>{escape(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    last = f"<tfoot><tr>{line(foot, 'td')}</tr></tfoot>" if foot else ""
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody>{last}</table></div>'


def soft(sentence: str) -> str:
    """A paragraph that explains, in a quieter colour."""
    return f'<p class="soft">{escape(sentence)}</p>'


def escape(value: object) -> str:
    """Any value as text that is safe in HTML, attributes included."""
    return html.escape(str(value))


def or_dash(value: Any, show: Callable[[Any], str]) -> str:
    """``show(value)``, or a dash for what is not known."""
    return "–" if value is None else show(value)


def integer(value: int | None) -> str:
    """A whole number with thousands apart."""
    return or_dash(value, "{:,}".format)


def decimal(value: float | None) -> str:
    """A loss, to four places."""
    return or_dash(value, "{:.4f}".format)


def percent(share: float | None) -> str:
    """A share of 1 in percent."""
    return or_dash(share, lambda known: f"{100 * known:.1f} %")


def plural(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


CSS = """
:root { --paper: #fff; --card: #f6f7f9; --ink: #1d2733; --soft: #5b6775; --faint: #dde2e8;
  --blue: #2f6db3; --orange: #d9772b; --teal: #2a9188; --good: #227a45; --warn: #946200; --bad: #b3372f }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --card: #1d232a; --ink: #e4e9ee; --soft: #9ba7b4; --faint: #353e48;
  --blue: #74abe6; --orange: #eb9c5c; --teal: #5cc2b6; --good: #6cc28b; --warn: #dfb04d; --bad: #f0867d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 2.6rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--faint); font-size: 1.15rem }
.status { margin-left: .6rem; padding: .15em .6em; border: 1px solid; border-radius: 1em; font-size: .8rem;
  font-weight: 500; vertical-align: middle; white-space: nowrap; color: var(--soft) }
.finished { color: var(--good) } .interrupted { color: var(--warn) } .failed { color: var(--bad) }
.soft { margin: .2rem 0 .6rem; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0 0 }
@media (min-width: 60rem) { dl { grid-template-columns: repeat(5, 1fr) } }
dl div { padding: .6rem .8rem; border-radius: .4rem; background: var(--card) }
dt, dd small { color: var(--soft); font-size: .8rem } dd small { display: block }
dd { margin: 0; font-size: 1.25rem; line-height: 1.35 }
.hashes { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); margin-top: .6rem }
.hashes dd { font: .72rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
figure { display: flex; flex-direction: column; max-width: 38rem; margin: 0 } figcaption { font-weight: 600 }
svg { display: block; width: 100%; height: auto; margin-top: auto }
svg text { font-family: inherit !important }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 .4rem; padding: 0; list-style: none;
  color: var(--soft); font-size: .8rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: 2px }
.split { display: flex; height: .8rem; margin: .4rem 0; border-radius: 3px; overflow: hidden }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--faint); max-width: 30rem; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 500; white-space: nowrap } tfoot td { border: 0; font-weight: 600 }
.r { text-align: right } .r, td:first-child { white-space: nowrap } summary { cursor: pointer }
h3 { margin: 1.6rem 0 .6rem; font-size: 1rem } .heat td { padding: .3rem .6rem; border: 1px solid var(--paper) }
pre { padding: 1rem; border-radius: .4rem; background: var(--card); overflow-x: auto;
  font: .8rem/1.5 ui-monospace, monospace }
"""
