"""A study: several trainings, each with several seeds, pruned to many sparsities, measured, gathered and drawn.

    python -m experiments.run_study experiments/studies/digits_ablations.yaml --out results/digits_ablations
    python -m experiments.run_study experiments/studies/digits_ablations.yaml --out results/k1 --only k1,k10 --jobs 2
    python -m experiments.run_study --draw --out results/digits_ablations

A study is a YAML file:

    title: Digits, SFW against SGD
    seeds: [0, 1, 2]
    sparsities: "0,0.1:0.9:0.1,0.91:0.99:0.01"  # as --sparsities of sfw_dist.evaluate; drops are measured from 0
    arguments: {data.root: data}                # of every arm; may be left out, as an arm's own
    arms:
      sfw: {label: SFW, config: configs/digits/sfw.yaml}
      sgd: {label: SGD, config: configs/digits/sgd.yaml, arguments: {optimizer.lr: 0.1}}

Each arm and seed is one run, <study>-<arm>-s<seed>, whose output goes to a log next to its folder. A study that was
interrupted resumes when it is started again: finished runs are not repeated. --out receives runs.csv, the study's file,
commands.txt, and what --draw makes of runs.csv: summary.csv, table.md and the figures that suit it (curve.png,
compression.png, bars.png).
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from experiments.figures import FIGURES, draw_all
from experiments.runs import Outcome, PlannedRun, check, cores, pending, run_all
from experiments.study import Study, read_study
from experiments.tables import Row, markdown, read_rows, rows_csv, summarise, summary_csv
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import make_folder, replacing, user_path, write_text
from sfw_dist.report.runs import Run, read_runs


def gather(study: Study, runs: Sequence[PlannedRun], out: Path) -> None:
    """Write ``runs.csv``, the study's file and the commands of finished runs into ``out``."""
    make_folder(out)
    write_text(out / "runs.csv", rows_csv([row for run in runs for row in _rows(study, run)]))
    write_text(out / f"{study.name}.yaml", study.text)
    write_text(out / "commands.txt", "".join(f"{line}\n" for run in runs for line in run.commands_run()))


def _rows(study: Study, planned: PlannedRun) -> list[Row]:
    (run,) = read_runs([planned.folder])
    epochs = run.epochs()
    validation = epochs[-1].get("validation_top1") if epochs else None
    seconds = [epoch["seconds"] for epoch in epochs if "seconds" in epoch]
    return [
        Row(
            study=study.name,
            arm=planned.arm.name,
            label=planned.arm.label,
            seed=planned.seed,
            sparsity=result.sparsity,
            compression=1 / (1 - result.sparsity),
            sparsity_all=result.sparsity_all,
            top1=100 * result.top1,
            top1_recalibrated=_recalibrated(run, result.sparsity),
            validation_top1=None if validation is None else 100 * validation,
            seconds_train=round(sum(seconds), 3) if seconds else None,
        )
        for sparsity in study.sparsities
        if (result := run.at(sparsity)) is not None
    ]


def _recalibrated(run: Run, sparsity: float) -> float | None:
    result = run.recalibrated and run.recalibrated.at(sparsity)
    return 100 * result.top1 if result else None


def draw(out: Path, title: str | None = None) -> None:
    """Write the summary, the table and the figures of ``out/runs.csv`` next to it.

    Args:
        out: folder of the results.
        title: by default that of the study's copy in ``out``, or the study's name if there is no copy.
    """
    rows = read_rows(out / "runs.csv")
    copy = out / f"{rows[0].study}.yaml"
    title = title or (read_study(copy).title if copy.is_file() else rows[0].study)
    summary = summarise(rows)
    drawn = draw_all(summary, title)
    write_text(out / "summary.csv", summary_csv(summary))
    write_text(out / "table.md", markdown(summary, title))
    for name, content in drawn.items():
        _write(out / name, content)
    for name in set(FIGURES) - set(drawn):  # an earlier study's figure would contradict this one
        (out / name).unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def run_study(study: Study, runs: Sequence[PlannedRun], jobs: int) -> None:
    """Train and measure what is missing.

    Args:
        study: the study.
        runs: its runs.
        jobs: runs at a time.

    Raises:
        UserError: a run's arguments are wrong, its folder holds another run, or it failed, after all others ended.
    """
    check(runs)
    unfinished = [run for run in runs if pending(run)]
    print(f"{study.title}: {len(runs)} runs, {len(runs) - len(unfinished)} of them done already", flush=True)
    outcomes = run_all(unfinished, jobs)
    failed = [run for run, outcome in outcomes.items() if outcome is Outcome.FAILED]
    if failed:
        named = ", ".join(f"{run.name} (see {run.log})" for run in failed)
        raise UserError(
            f"{len(failed)} of {len(unfinished)} runs failed: {named}: correct that, then start the study again"
        )


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", type=user_path, metavar="STUDY", help="YAML file of the study")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--runs-dir", type=user_path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (default: 1)"
    )
    parser.add_argument("--only", metavar="ARM[,ARM]", help="run, gather and draw only these arms (default: all)")
    parser.add_argument("--draw", action="store_true", help="only draw again what runs.csv in --out holds")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(argv)
    if options.draw:
        if options.study or options.only:
            what = options.study or f"--only {options.only}"
            raise UserError(f"{what} with --draw: it draws all of {options.out / 'runs.csv'}, so leave that out")
        draw(options.out)
        return 0
    if options.study is None:
        raise UserError(
            "no study given: name its file, as in experiments/studies/digits_ablations.yaml, or give --draw"
        )
    if not 1 <= options.jobs <= cores():
        raise UserError(f"--jobs {options.jobs}: each needs a core, so take 1 to {cores()}")
    study = read_study(options.study)
    if options.only:
        study = study.only(options.only.split(","))
    runs = [
        PlannedRun(study, arm, seed, options.runs_dir, threads=cores() // options.jobs)
        for seed in study.seeds  # every arm has one seed before any has two
        for arm in study.arms
    ]
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        run_study(study, runs, options.jobs)
    except KeyboardInterrupt:
        again = shlex.join(["python", "-m", "experiments.run_study", *(sys.argv[1:] if argv is None else argv)])
        print(f"interrupted: every run keeps what it saved\nresume with: {again}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    by_arm = sorted(runs, key=lambda run: study.arms.index(run.arm))
    gather(study, by_arm, options.out)
    draw(options.out, study.title)
    print((options.out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
