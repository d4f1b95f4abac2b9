"""python -m kd_d2.data.synthetic OUT --train 600 --val 150 --seed 0"""

import argparse
import sys

from ...errors import UserError
from . import DEFAULT_IMAGE_SIZE, DEFAULT_NUM_TRAIN, DEFAULT_NUM_VAL, DEFAULT_SEED, DEFAULT_STYLE, ensure_synthetic
from .scenes import CLASSES, STYLES


def main(argv: list[str] | None = None) -> int:
    """Write a synthetic set; the exit status is 2, after one sentence, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_d2.data.synthetic",
        description="Write a synthetic object-detection set in COCO form.",
    )
    parser.add_argument("out", metavar="OUT", help="folder of the set; train/ and val/ are made in it")
    parser.add_argument("--train", type=int, default=DEFAULT_NUM_TRAIN, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=DEFAULT_NUM_VAL, help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="0 or more (%(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=DEFAULT_IMAGE_SIZE, help="longer image side in px (%(default)s)"
    )
    parser.add_argument("--style", choices=STYLES, default=DEFAULT_STYLE, help="how hard the images are (%(default)s)")
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
