"""The page's style sheet: readable at any width, light or dark as the reader's system is, and on paper."""

from __future__ import annotations

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #22252b; --soft: #5d6470; --line: #e3e4e7; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --card: #1e2126; --ink: #e8e9ec; --soft: #a2a8b3; --line: #32363d; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 64rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
main { padding-bottom: 4rem; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 2rem; font-size: clamp(1.7rem, 5vw, 2.5rem); letter-spacing: -0.02em; }
h2 { margin: 3.2rem 0 1rem; padding-top: 1.1rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 0 0 .6rem; font-size: 1.02rem; }
.kicker {
  margin: 0 0 .4rem; color: var(--accent);
  font-size: .78rem; font-weight: 650; letter-spacing: .09em; text-transform: uppercase;
}
.lead { margin: .7rem 0 0; color: var(--soft); font-size: 1.08rem; }
.soft { color: var(--soft); }
.scroll { margin: 1rem 0 1.6rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .5rem; color: var(--soft); font-size: .88rem; text-align: left; }
th, td { padding: .5rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
td:first-child { font-weight: 600; white-space: nowrap; }
td strong { color: var(--accent); }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .55em; border-radius: 50%; }
.notes { margin: 0; padding: .8rem 1rem .8rem 2rem; border-left: 3px solid #e69f00; background: var(--card); }
.notes { font-size: .93rem; }
figure { margin: 1.2rem 0 2rem; }
figure img { display: block; width: 100%; height: auto; padding: .7rem; border-radius: .6rem; background: #fff; }
figure img { border: 1px solid var(--line); }
figcaption { margin-top: .6rem; color: var(--soft); font-size: .9rem; max-width: 46rem; }
dt { font-weight: 650; }
dd { margin: .1rem 0 .9rem; color: var(--soft); max-width: 46rem; }
article { margin: 0 0 1rem; padding: 1.1rem 1.2rem; background: var(--card); }
article { border: 1px solid var(--line); border-radius: .6rem; }
pre {
  margin: 0 0 .6rem; padding: .8rem 1rem; border-radius: .4rem; background: var(--paper);
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
summary { padding: .25rem 0; color: var(--accent); cursor: pointer; }
@media print { figure, article, tr { break-inside: avoid; } }
"""
