#!/usr/bin/env python
"""How hard each loss of a distillation pulls at the student, beside the detector's own losses: what weights are chosen by.

    tools/gradients.py --config-file CONFIG [--weights CHECKPOINT] [--batches 4] [--iteration N] [KEY VALUE ...]

A row a loss, means over training batches: its value; the norm of its gradient in the parameters of the student's neck, which all
losses share, over that of the detector's own losses; and the cosine of the two gradients, below 0 where the method pulls away
from what the detector wants. A second table has a row a method: the same ratio of its losses together, its WEIGHT, and the WEIGHT
that would give it the ratio MODEL.KD.BALANCE.TARGET, alone, at this point of the training. The student is as a training would begin (MODEL.WEIGHTS, inheritance), or a checkpoint; of one that this
library wrote the methods' own layers are taken too. The batches are the first of a training with the config's SEED, or 0 where it
has none. N, by default SOLVER.MAX_ITER - 1, matters for schedules alone.
"""

import argparse
from itertools import islice

from kd_d2 import KDMetaArch, UserError, load_config
from kd_d2.checkpoint import distiller_states, load_complete
from kd_d2.config import find_file
from kd_d2.data import build_stream_loader, register_coco_json, register_synthetic
from kd_d2.engine.checks import check_classes, check_datasets, check_distillation
from kd_d2.engine.gradients import Pull, measure_pulls
from kd_d2.engine.learning_rate import check_schedule
from kd_d2.engine.trainer import load_initial_weights
from kd_d2.errors import exit_on_user_error

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

HEADERS = ("loss", "value", "gradient / own", "cosine with own")
WEIGHT_HEADERS = ("method", "gradient / own", "WEIGHT")


def build(cfg: CfgNode, weights: str | None) -> KDMetaArch:
    """Student and teacher; the student from the checkpoint, or as a training begins."""
    cfg = cfg.clone()
    cfg.MODEL.KD.BALANCE.ENABLED = False
    model = build_model(cfg)
    check_classes(cfg, model)
    if weights is None:
        load_initial_weights(cfg, model)
        return model
    load_complete(model.student, weights, "the student")
    states = distiller_states(weights)
    for name, distiller in model.distillers.items():
        try:
            distiller.load_state_dict(states[name])
        except RuntimeError:
            print(f"The layers of {name} are as a training begins: {weights} has none that fit.", flush=True)
    return model


def main(args: argparse.Namespace) -> None:
    if args.batches < 1:
        raise UserError(f"--batches is {args.batches}; it must be at least 1.")
    if args.iteration is not None and args.iteration < 0:
        raise UserError(f"--iteration is {args.iteration}; it must be at least 0.")
    cfg = load_config(args.config_file, args.opts)
    check_distillation(cfg)
    weights = args.weights and find_file(args.weights, "--weights")
    register_synthetic()
    register_coco_json(cfg)
    check_datasets(cfg, train=True)
    check_schedule(cfg, 1)
    seed = max(cfg.SEED, 0)
    seed_all_rng(seed)
    model = build(cfg, weights).train()
    batches = islice(build_stream_loader(cfg, seed), args.batches)
    iteration = cfg.SOLVER.MAX_ITER - 1 if args.iteration is None else args.iteration
    pulls = measure_pulls(model, batches, iteration)
    rows = [(n, p.loss, p.strength, p.cosine) for n, p in pulls.items() if n not in model.distillers]
    print(tabulate(rows, HEADERS, tablefmt="github", floatfmt=("", ".4g", ".3g", "+.3f")))
    target = cfg.MODEL.KD.BALANCE.TARGET
    rows = [(name, *weight_for(target, name, model, pulls[name])) for name in model.distillers]
    headers = (*WEIGHT_HEADERS, f"WEIGHT for {target:g}")
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=("", ".3g", ".4g", ".3g")), flush=True)


def weight_for(target: float, name: str, model: KDMetaArch, pull: Pull) -> tuple[float, float, float | None]:
    """A method's gradient ratio, its WEIGHT, and the WEIGHT that gives the ratio `target`; None where it has no gradient."""
    weight = model.distillers[name].weight
    return pull.strength, weight, weight * target / pull.strength if pull.strength else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the distillation")
    parser.add_argument("--weights", help="a checkpoint of the student (default: as a training begins)")
    parser.add_argument("--batches", type=int, default=4, help="of training data (default 4)")
    parser.add_argument("--iteration", type=int, help="of the training, for schedules (default the last)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides: KEY VALUE ...")
    with exit_on_user_error():
        main(parser.parse_args())
