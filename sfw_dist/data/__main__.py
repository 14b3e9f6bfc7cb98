"""``python -m sfw_dist.data``: prepare and verify data sets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sfw_dist.errors import command_imports, named, reports_user_errors

with command_imports("sfw_dist.data", "train"):
    from sfw_dist.data.datasets.csv_set import Table
    from sfw_dist.data.datasets.registry import DATASETS
    from sfw_dist.data.manifest import read_manifest, set_folder
    from sfw_dist.data.options import Options
    from sfw_dist.data.prepare import prepare, verify
    from sfw_dist.files import user_path

EXAMPLES = """\
examples:
  python -m sfw_dist.data prepare digits --root data
  python -m sfw_dist.data prepare fashion_mnist --root /scratch/data --json
  python -m sfw_dist.data prepare tiny_imagenet --root /scratch/data --skip-bad
  python -m sfw_dist.data prepare photos --name flowers --size 96 --test-fraction 0.2
  python -m sfw_dist.data prepare photos --name flowers --csv labels.csv --image-column file --label-column species
  python -m sfw_dist.data prepare my_data:flowers --name flowers --size 48x64
  python -m sfw_dist.data prepare /scratch/imagenet --name imagenet --size 224 --store jpeg
  python -m sfw_dist.data prepare imagefolder --root /scratch/flowers --again
  python -m sfw_dist.data verify fashion_mnist --root /scratch/data
"""
PREPARE = """\
Write a data set once into ROOT/NAME, for training, evaluation and jobs; does nothing when it is there.

SOURCE is
  a known set: its files are taken from ROOT/raw/NAME, and what is not there is downloaded into it;
  a folder of images: train/CLASS/* and val/CLASS/*, or CLASS/* with --test-fraction, or any files with --csv;
  package.module:function: a function that returns {"train": dataset, "test": dataset}, Datasets with a length whose
  items are (image, label), a DatasetDict, or pairs of arrays (images, labels).

When the raw files have changed since, it says which, and replaces ROOT/NAME with --again.
After an interruption it finishes what is left.
"""
VERIFY = "Hash every file of ROOT/NAME; exit status 1 and a line for each problem.\n"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
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
    prepare_parser, verify_parser = (
        commands.add_parser(
            command,
            parents=[common],
            help=text.partition(".\n")[0].partition(";")[0].lower(),
            description=text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for command, text in (("prepare", PREPARE), ("verify", VERIFY))
    )
    verify_parser.add_argument("name", metavar="NAME", help="of the data set")
    _add_prepare_options(prepare_parser)
    return parser


def _add_prepare_options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(sorted(DATASETS))
    parser.add_argument("source", metavar="SOURCE", help=f"a known set ({known}), a folder, or package.module:function")
    parser.add_argument(
        "--name", help="of the data set (default: that of the folder; of my_data:flowers it is my_data.flowers)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        metavar="N|HxW",
        help="scale images until N×N (or height×width) pixels are covered, and crop the centre "
        "(default: images have one size; imagefolder: 64)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="1: grey, 3: colours (default: as the first training image)"
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.0, metavar="F", help="part of each class to test on, if no part is"
    )
    parser.add_argument(
        "--store",
        choices=("raw", "jpeg"),
        default="raw",
        help="raw: pixels; jpeg: whole images, of which training cuts random boxes, for sets too large for pixels "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--jpeg-quality", type=int, metavar="Q", help="of images that are scaled or are no JPEG (default: 90)"
    )
    for option in ("mean", "std"):
        parser.add_argument(
            f"--{option}", type=_numbers, metavar="X,…", help="per channel, in [0, 1] (default: of the training images)"
        )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that are missing or damaged; the manifest lists them",
    )
    parser.add_argument(
        "--again", action="store_true", help="replace ROOT/NAME, which keeps its size of images unless --size is given"
    )
    table = parser.add_argument_group("a table of images")
    table.add_argument("--csv", type=Path, metavar="FILE", help="a CSV file with a line for each image in SOURCE")
    table.add_argument("--image-column", default="image", help="column of the paths from SOURCE (default: %(default)s)")
    table.add_argument("--label-column", default="label", help="column of the classes (default: %(default)s)")
    table.add_argument("--split-column", help="column that says train or test (default: none, with --test-fraction)")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 64, or 48x64 for height and width") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: write 0.5,0.5,0.5") from None


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    options.root = user_path(options.root)
    if options.command == "prepare":
        return _prepare(options)
    return _verify(options.name, options.root, options.json)


def _prepare(options: argparse.Namespace) -> int:
    table = None
    if options.csv:
        columns = options.image_column, options.label_column, options.split_column
        table = Table(user_path(options.csv), *columns)
    folder = prepare(
        options.source,
        options.root,
        name=options.name,
        table=table,
        options=Options(
            size=options.size,
            channels=options.channels,
            test_fraction=options.test_fraction,
            mean=options.mean,
            std=options.std,
            skip_bad=options.skip_bad,
            store=options.store,
            jpeg_quality=options.jpeg_quality,
        ),
        again=options.again,
        check_source=True,
    )
    manifest = read_manifest(folder)
    if options.json:
        print(json.dumps({"folder": str(folder)} | asdict(manifest)))
    else:
        channels, height, width = manifest.image_shape
        counts = ", ".join(f"{count} {part}" for part, count in manifest.counts.items())
        skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
        left_out = f", {len(manifest.left_out)} left out" if manifest.left_out else ""
        print(f"{folder}: {counts} samples{skipped}{left_out}{'' if manifest.has_betons else ', without FFCV'}")
        print(
            f"{height}×{width} pixels (height×width), {channels} channel(s); {len(manifest.classes)} class(es): "
            f"{named(manifest.classes)}"
        )
        for text, files in (("skipped as unusable", manifest.skipped), ("left out as no images", manifest.left_out)):
            if files:
                print(f"{text}: {named(files)}")
        for note in manifest.notes:
            print(f"note: {note}")
    return 0


def _verify(name: str, root: Path, as_json: bool) -> int:
    folder, problems = set_folder(root, name), verify(name, root)
    if as_json:
        print(json.dumps({"folder": str(folder), "problems": problems}))
    else:
        print("\n".join(problems) or f"{folder}: every file is as prepared")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
