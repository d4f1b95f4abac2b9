"""python -m kd_d2.data.synthetic OUT --train 600 --val 150 --seed 0"""

import argparse
import sys

from ...errors import UserError
from . import DEFAULT_IMAGE_SIZE, DEFAULT_NUM_TRAIN, DEFAULT_NUM_VAL, DEFAULT_SEED, DEFAULT_STYLE, ensure_synthetic
from .scenes import CLASSES, STYLES


def main(argv: list[str] | None = None) -> int:
    """Generate a synthetic dataset. Return the exit status, which is 2 for invalid input."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_d2.data.synthetic",
        description="Generate a synthetic object detection dataset in COCO format.",
    )
    parser.add_argument("out", metavar="OUT", help="output folder; train/ and val/ are created in it")
    parser.add_argument("--train", type=int, default=DEFAULT_NUM_TRAIN, help="number of training images (%(default)s)")
    parser.add_argument("--val", type=int, default=DEFAULT_NUM_VAL, help="number of validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="random seed, 0 or more (%(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=DEFAULT_IMAGE_SIZE, help="longer image side in px (%(default)s)"
    )
    parser.add_argument("--style", choices=STYLES, default=DEFAULT_STYLE, help="drawing style (%(default)s)")
    args = parser.parse_args(argv)
    try:
        root = ensure_synthetic(
            args.out,
            num_train=args.train,
            num_val=args.val,
            seed=args.seed,
            image_size=args.image_size,
            style=args.style,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{root}: {args.train} training and {args.val} validation images of {len(CLASSES)} classes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
