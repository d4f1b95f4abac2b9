"""Starting a program: in one process, in several, or as one of those that torchrun started."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from ..errors import UserError, end_with


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run `main(args)` in every process of the job.

    Under torchrun the environment says which process this is. Otherwise --num-gpus and --num-machines do, through
    Detectron2's launcher. A UserError is printed as its sentence alone, and the program ends with exit status 2.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _join_torchrun()
            main(args)
            return
        present = torch.cuda.device_count()
        if args.num_gpus * args.num_machines > 1 and args.num_gpus > present:
            raise UserError(
                f"--num-gpus is {args.num_gpus}, but this machine has {present} usable GPUs; on CPUs start several processes with "
                "torchrun."
            )
        detectron2_launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
    except UserError as error:
        end_with(error)
    except ProcessRaisedException as error:
        # One of several processes raised: what arrives is its traceback as text, whose last line names the error.
        sentence = re.match(r"kd_d2[\w.]*Error: (.+)", str(error).strip().splitlines()[-1])
        if sentence is None:
            raise
        end_with(sentence[1])


def _join_torchrun() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
