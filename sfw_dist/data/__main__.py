"""``python -m sfw_dist.data``: prepare and verify data sets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("sfw_dist.data", "train"):
    from sfw_dist.data.datasets.registry import DATASETS, find_dataset
    from sfw_dist.data.manifest import prepare_again, read_manifest
    from sfw_dist.data.prepare import named, prepare, verify
    from sfw_dist.data.source import source_changes
    from sfw_dist.files import user_path

EXAMPLES = """\
examples:
  python -m sfw_dist.data prepare digits --root data
  python -m sfw_dist.data prepare fashion_mnist --root /scratch/data --json
  python -m sfw_dist.data prepare tiny_imagenet --root /scratch/data --skip-bad
  python -m sfw_dist.data prepare imagefolder --root /scratch/flowers --size 96
  python -m sfw_dist.data prepare imagefolder --root /scratch/flowers --again
  python -m sfw_dist.data verify fashion_mnist --root /scratch/data
"""


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("name", metavar="NAME", help=f"data set: {', '.join(sorted(DATASETS))}")
    common.add_argument(
        "--root", type=Path, default=Path("data"), help="folder of all data sets (default: %(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print one JSON object")

    parser = argparse.ArgumentParser(
        prog="python -m sfw_dist.data",
        description="Prepare data sets for training, and verify them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "prepare": "get and convert a data set into ROOT/NAME; does nothing when it is there.\n"
        "When the raw files have changed since, it says which, and replaces ROOT/NAME with --again.\n"
        "Raw files are taken from ROOT/raw/NAME (images of your own: ROOT/raw/imagefolder/{train,val}/CLASS/*), and\n"
        "what is not there is downloaded into it. After an interruption it finishes what is left.",
        "verify": "hash every file of ROOT/NAME; exit status 1 and a line for each problem",
    }
    prepare_parser, _ = (
        commands.add_parser(
            command,
            parents=[common],
            help=text.partition(".\n")[0],
            description=text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for command, text in texts.items()
    )
    prepare_parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="imagefolder: scale images to a shorter side of N pixels and crop the centre (default: 64)",
    )
    prepare_parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out image files that are missing or damaged; the manifest lists them",
    )
    prepare_parser.add_argument(
        "--again", action="store_true", help="replace ROOT/NAME, which keeps its size of images unless --size is given"
    )
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    options.root = user_path(options.root)
    if options.command == "prepare":
        return _prepare(options)
    return _verify(options.name, options.root, options.json)


def _prepare(options: argparse.Namespace) -> int:
    dataset, folder = find_dataset(options.name), options.root / options.name
    changes = [] if options.again else source_changes(folder, dataset)
    if changes:
        raise UserError(f"the raw files of {folder} have changed ({named(changes)}): {prepare_again(folder)}")
    prepare(options.name, options.root, size=options.size, skip_bad=options.skip_bad, again=options.again)
    manifest = read_manifest(folder)
    if options.json:
        print(json.dumps({"folder": str(folder)} | asdict(manifest)))
    else:
        counts = ", ".join(f"{count} {part}" for part, count in manifest.counts.items())
        skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
        left_out = f", {len(manifest.left_out)} left out" if manifest.left_out else ""
        print(f"{folder}: {counts} samples{skipped}{left_out}{'' if manifest.has_betons else ', without FFCV'}")
        for text, files in (("skipped as unusable", manifest.skipped), ("left out as no images", manifest.left_out)):
            if files:
                print(f"{text}: {named(files)}")
        for note in manifest.notes:
            print(f"note: {note}")
    return 0


def _verify(name: str, root: Path, as_json: bool) -> int:
    problems = verify(name, root)
    if as_json:
        print(json.dumps({"folder": str(root / name), "problems": problems}))
    else:
        print("\n".join(problems) or f"{root / name}: every file is as prepared")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
