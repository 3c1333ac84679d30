"""The style of a report: one palette for the HTML page and the curves, on paper, light and dark screens."""

from __future__ import annotations

# The line style of each run: its colour on a light and on a dark background, and its dashes (points on, points off).
# Colour-blind people can tell these colours apart (Okabe and Ito, 2008). The dashes tell runs apart in black and white.
RUN_STYLES = (
    ("#0072b2", "#5cb0f2", ()),
    ("#d55e00", "#ff8f4d", (6, 2)),
    ("#009e73", "#33cc9f", (2, 1.5)),
    ("#cc79a7", "#e8a5cb", (6, 2, 1.5, 2)),
    ("#b58900", "#efc14a", (9, 3)),
    ("#4f4f4f", "#c4c4c4", (3, 3)),
)
# The colours of the curves' text, axes and grid. In HTML all colours are replaced by CSS variables, so that a curve
# follows the page's light or dark theme.
INK, MUTED, GRID = "#1f2329", "#626a73", "#e3e6ea"
_DARK_COLOURS = {"ink": "#e6e9ed", "muted": "#9aa3ad", "grid": "#343b43"}
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"}
VARIABLES |= {light: f"run-{i}" for i, (light, _, _) in enumerate(RUN_STYLES)}


def _variables(colours: dict[str, str]) -> str:
    """CSS that sets variables to colours."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_LIGHT = _variables(
    {name: colour for colour, name in VARIABLES.items()}
    | {"paper": "#ffffff", "panel": "#f6f7f9", "shadow": "#1f23294d"}
)
_DARK = _variables(
    {**_DARK_COLOURS, **{f"run-{i}": dark for i, (_, dark, _) in enumerate(RUN_STYLES)}}
    | {"paper": "#14171b", "panel": "#1d2126", "shadow": "#9aa3ad73"}
)

CSS = f"""\
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
main {{ max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }}
h1, h2, h3 {{ line-height: 1.25; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.7rem; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .9rem; padding-bottom: .35rem; border-bottom: 1px solid var(--grid); }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 .6rem; }}
p {{ margin: .7rem 0; max-width: 46rem; overflow-wrap: anywhere; }}
/* A shadow at an edge beyond which a table goes on: two covers scroll with it and hide the shadows where it ends. */
.wide {{ overflow-x: auto; margin: .9rem 0; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
  radial-gradient(farthest-side at 0 50%, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
  radial-gradient(farthest-side at 100% 50%, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }}
table {{ border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .42rem 1.1rem .42rem 0; text-align: start; vertical-align: top;
  border-bottom: 1px solid var(--grid); }}
th {{ color: var(--muted); font-weight: 600; font-size: .84rem; white-space: nowrap; }}
.number {{ text-align: right; padding-left: 1.1rem; padding-right: 0; white-space: nowrap; }}
.texts {{ width: 100%; }}
td:first-child {{ min-width: 7rem; }}
.texts td:first-child {{ min-width: 14rem; }}
.curves {{ display: grid; grid-template-columns: repeat(6, 1fr); gap: .9rem; }}
.sixths-2 {{ grid-column: span 2; }} .sixths-3 {{ grid-column: span 3; }} .sixths-6 {{ grid-column: span 6; }}
figure {{ margin: 0; padding: .6rem .5rem .3rem; background: var(--panel); border-radius: .5rem; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; max-height: 15rem; stroke-linejoin: round; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; margin: 0 0 .8rem; padding: 0; }}
.legend li {{ display: flex; align-items: center; gap: .5rem; overflow-wrap: anywhere; }}
.legend svg {{ flex: none; width: 2.2rem; height: .6rem; }}
details {{ margin: .7rem 0; }}
summary {{ cursor: pointer; color: var(--muted); }}
pre {{ overflow-x: auto; padding: .9rem 1rem; background: var(--panel); border-radius: .5rem; font-size: .84rem; }}
@media (max-width: 60rem) {{
  .curves {{ grid-template-columns: 1fr 1fr; }}
  .curves figure {{ grid-column: auto; }}
  .curves figure:last-child:nth-child(odd) {{ grid-column: span 2; }}
}}
@media (max-width: 44rem) {{
  .curves {{ grid-template-columns: 1fr; }}
  .curves figure, .curves figure:last-child:nth-child(odd) {{ grid-column: auto; }}
  figure svg {{ max-height: none; }}
  main {{ padding: .8rem 1rem 3rem; }}
  table {{ font-size: .86rem; }}
  .number {{ padding-left: .8rem; }}
  td:first-child {{ min-width: 5.5rem; }}
  .texts thead {{ display: none; }}
  .texts tr {{ display: block; padding: .7rem 0; border-bottom: 1px solid var(--grid); }}
  .texts td {{ display: flex; gap: .8rem; padding: .12rem 0; border: 0; text-align: start; }}
  .texts td::before {{ content: attr(data-name); flex: none; width: 7rem; color: var(--muted); }}
  .texts td:first-child {{ font-weight: 600; padding-bottom: .3rem; }}
  .texts td:first-child::before {{ display: none; }}
}}
@media print {{
  body {{ font-size: 10.5pt; }}
  main {{ max-width: none; padding: 0; }}
  h2, h3 {{ break-after: avoid; }}
  tr {{ break-inside: avoid; }}
  .wide {{ overflow: visible; }}
  table {{ font-size: 9.5pt; }}
  th, .number {{ white-space: normal; padding-left: .4rem; }}
  th:first-child {{ padding-left: 0; }}
  figure {{ background: none; padding: 0; }}
}}
"""
