"""The page: one file that opens from disk, loads nothing, and can be mailed."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from sfw_dist.report.figures import colour
from sfw_dist.report.runs import PruningResult, Run
from sfw_dist.report.style import STYLE
from sfw_dist.report.table import AS_TRAINED, Curve, chosen_sparsities, curves, notes, percent, sparsity_within

TABLE_SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BUDGETS = (0.005, 0.01, 0.02, 0.05)  # accuracy that may be lost, as fractions
MISSING = "–"

# The policy forbids the page to load anything, whatever a run's files hold.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Pruning report: $title</title>
<style>
$style</style>
</head>
<body>
<header>
<p class="kicker">Pruning report</p>
<h1>$title</h1>
<p class="lead">$lead</p>
</header>
<main>
<section>
<h2>Accuracy at a glance</h2>
$accuracy
$notes
</section>
<section>
<h2>Accuracy against sparsity</h2>
$curve
$budget
$savings
</section>
<section>
<h2>Weights and layers</h2>
$weights
$layers
</section>
<section>
<h2>Training</h2>
$training
</section>
<section>
<h2>Definitions</h2>
$definitions
</section>
<section>
<h2>Runs</h2>
$runs
</section>
</main>
</body>
</html>
""")

DEFINITIONS = {
    "Sparsity": "The fraction of the weights that is removed: set to zero, smallest magnitudes first, once, with no "
    "training afterwards. The columns name the sparsity asked for; the figures use the one achieved. With "
    "granularity “filter” the sparsity asked for is a fraction of the filters; with “rank” it is one of the "
    "parameters, and a weight's parameters then are those of its two factors.",
    "Pruning": "What is removed as one piece × what the pieces are ranked against × what makes a weight worth "
    "keeping, and the scope: which parameters are pruned.",
    "Prunable weights": "Those that the scope allows to remove: the weights of convolutions and linear layers for "
    "“weights”, every parameter for “all”.",
    "Compression ratio": "All parameters of the network over those that are kept, biases and normalisation included. "
    "It is therefore a little below 1 / (1 − sparsity) when only weights are pruned.",
    "Theoretical speed-up": "FLOPs of the dense network over those that remain when multiplications by removed "
    "weights are skipped, in convolutions and linear layers. Hardware reaches it only with kernels for sparse weights.",
    "BatchNorm recalibrated": "After pruning, the running statistics of BatchNorm were reset and measured again on "
    "training images; no weight changed. The same was done to the dense network that such accuracies are compared "
    "with.",
    "Top-1": "The fraction of images whose highest score is the right class.",
}
CAPTIONS = {
    "curve.png": "Top-1 accuracy after one-shot pruning. The axis of sparsity is logarithmic in what is kept, so that "
    "the high sparsities are not squeezed together. Where BatchNorm was recalibrated after pruning, solid lines are "
    "with that and dashed ones without. A dotted line is the accuracy of the unpruned network as trained.",
    "weights.png": "Weights of convolutions and linear layers, counts on a logarithmic axis. The more of them lie near "
    "zero, the less the network loses when the smallest are removed.",
    "layers.png": "How a sparsity of the whole network falls on its layers, in the order of the network. A cross is a "
    "layer with no weight left.",
    "training.png": "The dense training, once for all sparsities.",
}


def render(runs: Sequence[Run], images: Mapping[str, bytes]) -> str:
    """The page as HTML. ``images`` are the PNG files by name; where a figure is not among them the page says so."""
    results = [result for run in runs for result in run.results]
    title = ", ".join(run.label for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    splits = ", ".join(sorted({result.split for result in results}))
    samples = ", ".join(f"{count:,}" for count in sorted({result.samples for result in results}))
    sparsities = chosen_sparsities(runs, TABLE_SPARSITIES)
    return PAGE.substitute(
        title=escape(title),
        lead=escape(f"Trained once, pruned to each sparsity, not retrained. Evaluated on {samples} {splits} images."),
        style=STYLE,
        accuracy=_accuracy_table(runs, sparsities),
        notes=_notes(notes(runs)),
        budget=_budget_table(runs),
        savings=_savings_table(runs, sparsities),
        definitions=_definitions(DEFINITIONS),
        runs="\n".join(_details(run, index) for index, run in enumerate(runs)),
        **{name.removesuffix(".png"): _figure(name, images.get(name)) for name in CAPTIONS},
    )


def _accuracy_table(runs: Sequence[Run], sparsities: Sequence[float]) -> str:
    """Curves as rows, sparsities as columns; the best of a column is set in bold."""
    rows = curves(runs)
    columns = [[row.run.dense_top1 for row in rows]]
    columns += [[result.top1 if (result := row.run.at(sparsity)) else None for row in rows] for sparsity in sparsities]
    cells = [_top1_column(column) for column in columns]
    batchnorm = _batchnorm_column(rows)
    head = ["Run", "Optimizer", "Pruning", *batchnorm[0], "Dense", *map(percent, sparsities)]
    body = [
        [
            _run_cell(row.run, row.index),
            escape(row.run.optimizer) or MISSING,
            escape(_methods(row.run)),
            *batchnorm[place],
            *(column[place - 1] for column in cells),
        ]
        for place, row in enumerate(rows, 1)
    ]
    return _table("Top-1 accuracy in percent, by sparsity", head, body, text_columns=3 + len(batchnorm[0]))


def _batchnorm_column(rows: Sequence[Curve]) -> list[list[str]]:
    """A column's heading and cells, as lists; both are empty where no run has two curves to distinguish."""
    if all(row.batchnorm == AS_TRAINED for row in rows):
        return [[] for _ in (None, *rows)]
    return [["BatchNorm"], *([row.batchnorm] for row in rows)]


def _budget_table(runs: Sequence[Run]) -> str:
    rows = curves(runs)
    batchnorm = _batchnorm_column(rows)
    head = ["Run", *batchnorm[0], *(f"{100 * budget:g} point{'s' if budget > 0.01 else ''}" for budget in BUDGETS)]
    body = [
        [
            _run_cell(row.run, row.index),
            *batchnorm[place],
            *(_percent_or_missing(sparsity_within(row.run, budget)) for budget in BUDGETS),
        ]
        for place, row in enumerate(rows, 1)
    ]
    caption = "What an accuracy budget buys: the sparsity up to which top-1 stays this close to the dense network"
    return _table(caption, head, body, text_columns=1 + len(batchnorm[0]))


def _savings_table(runs: Sequence[Run], sparsities: Sequence[float]) -> str:
    head = ["Run", *map(percent, sparsities)]
    body = [
        [_run_cell(run, index), *(_savings(run.at(sparsity)) for sparsity in sparsities)]
        for index, run in enumerate(runs)
    ]
    return _table("Compression ratio, and below it the theoretical speed-up, by sparsity", head, body)


def _table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table that scrolls by itself on a narrow screen. The cells of ``body`` are HTML, the rest is text."""
    kinds = ["text" if column < text_columns else "number" for column in range(len(head))]
    header = "".join(
        f'<th scope="col" class="{kind}">{escape(cell)}</th>' for kind, cell in zip(kinds, head, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in body
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _run_cell(run: Run, index: int) -> str:
    return f'<span class="swatch" style="background:{colour(index)}"></span>{escape(run.label)}'


def _top1_column(column: Sequence[float | None]) -> list[str]:
    shown = [MISSING if top1 is None else f"{100 * top1:.1f}" for top1 in column]
    best = max((top1 for top1 in column if top1 is not None), default=None)
    if best is None or len(column) == 1:
        return shown
    return [f"<strong>{text}</strong>" if text == f"{100 * best:.1f}" else text for text in shown]


def _savings(result: PruningResult | None) -> str:
    if result is None:
        return MISSING
    return f'{result.compression_ratio:.1f}×<br><span class="soft">{result.theoretical_speedup:.1f}×</span>'


def _percent_or_missing(sparsity: float | None) -> str:
    return MISSING if sparsity is None else percent(sparsity)


def _methods(run: Run) -> str:
    """How the run was pruned; the unpruned network counts only where there is no other result."""
    return "; ".join(sorted({result.method for result in run.results if result.sparsity > 0})) or run.results[0].method


def _notes(found: Sequence[str]) -> str:
    if not found:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in found) + "</ul>"


def _figure(name: str, image: bytes | None) -> str:
    if image is None:
        return f'<p class="soft">{escape(name)} is not drawn: no run has the data for it.</p>'
    caption = escape(CAPTIONS[name])
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _definitions(meanings: Mapping[str, str]) -> str:
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in meanings.items())
    return f"<dl>{pairs}</dl>"


def _shown(value: object) -> str:
    """A list is a command line."""
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)


def _details(run: Run, index: int) -> str:
    """The commands that repeat the run (elsewhere: its folder is taken), its configuration and its environment."""
    config, again = (shlex.quote(str(path)) for path in (run.folder / "config.yaml", Path("repeated", run.folder.name)))
    sparsities = ",".join(f"{result.sparsity:g}" for result in run.results)
    ranks = run.environment.get("world_size", 1)  # the last bits of sums over ranks depend on their number
    commands = (
        f"python -m launch.local --nproc {ranks} --config {config} --runs_dir repeated\n"
        f"python -m sfw_dist.evaluate {again} --sparsities {sparsities}"
    )
    environment = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_shown(value))}</td></tr>'
        for key, value in run.environment.items()
    )
    parts = [
        f"<h3>{_run_cell(run, index)}</h3>",
        f"<pre>{escape(commands)}</pre>",
        f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>",
    ]
    if environment:
        table = f'<div class="scroll"><table>{environment}</table></div>'
        parts.append(f"<details><summary>environment.json</summary>{table}</details>")
    return f"<article>{''.join(parts)}</article>"
