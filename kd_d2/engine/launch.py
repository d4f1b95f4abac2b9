"""Program launch: in one process, in several, or as one of the processes started by torchrun."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError, as_user_error, check_at_least, check_number, exit_on_user_error
from .stop_request import forwarded_to_children


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run `main(args)` in every process of the job as a program.

    A UserError exits with status 2 and prints only its message; a signal exits with status 128 + the signal number.
    """
    with exit_on_user_error():
        run_processes(main, args)


def run_processes(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run `main(args)` in every process of the job.

    Under torchrun, the environment defines the rank of this process. Otherwise, Detectron2's launcher starts --num-gpus
    processes on each of --num-machines machines: one per GPU, or on CPUs if there is no GPU and MODEL.DEVICE is "cpu".

    Raises:
        UserError: that of a process, or the arguments do not fit the machine.
    """
    is_of_torchrun = _world_size() > 1
    if is_of_torchrun and not torch.distributed.is_initialized():
        _join_torchrun(_timeout(args))
    else:
        _check_processes(args)
    if is_of_torchrun or args.num_gpus * args.num_machines <= 1:
        main(args)
    else:
        _launch_several(main, args)


def _world_size() -> int:
    """Return the number of processes of torchrun, or 1 without it."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal():
        raise UserError(
            f"The environment variable WORLD_SIZE is {text!r}; it must be the number of processes that torchrun started, or unset."
        )
    return int(text)


def _launch_several(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    _check_gpus(args.num_gpus, args.opts)
    try:
        with forwarded_to_children():
            detectron2_launch(
                _explaining_errors,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                (main, args),
                _timeout(args),
            )
    except ProcessRaisedException as error:
        # A child process raised: the message is its traceback as text, and the last line names the exception.
        last = str(error).strip().splitlines()[-1]
        sentence = re.match(r"kd_d2[\w.]*Error: (.+)", last)
        if sentence is None:
            raise
        raise UserError(sentence[1]) from None
    except ProcessExitedException as error:
        number = -error.exit_code
        if number == signal.SIGKILL:
            raise UserError(
                f"Rank {error.error_index} was killed (SIGKILL), most likely because it ran out of memory; the other ranks were terminated too."
            ) from error
        if number == signal.SIGABRT:
            raise UserError(
                f"Rank {error.error_index} aborted (SIGABRT), as NCCL does when another rank does not respond within --rank-timeout; see its "
                "last lines above."
            ) from error
        sys.exit(128 + number if number > 0 else error.exit_code)


def _explaining_errors(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run `main(args)` in a child process, and raise a UserError for an error that `as_user_error` explains.

    SIGINT, which the child receives also when its parent process dies, is not ignored even if the parent ignores it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(args)
    except (OSError, RuntimeError, MemoryError, EOFError) as error:
        explained = as_user_error(error)
        if explained is None:
            raise
        raise explained from error


def _check_processes(args: argparse.Namespace) -> None:
    check_at_least("--num-machines", args.num_machines, 1)
    least = 0 if args.num_machines == 1 else 1  # 0 is one process, as in Detectron2
    if args.num_gpus < least:
        raise UserError(
            f"--num-gpus is {args.num_gpus}; with --num-machines {args.num_machines} it must be at least {least}."
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank}; it must be from 0 to below --num-machines {args.num_machines}."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines: several machines need --dist-url, such as tcp://HOST:PORT of the first one.")


def _check_gpus(wanted: int, opts: list[str]) -> None:
    present = torch.cuda.device_count()
    on_cpus = present == 0 and ("MODEL.DEVICE", "cpu") in pairwise(opts)
    if wanted > present and not on_cpus:
        raise UserError(
            f"--num-gpus is {wanted}, but this machine has {present} usable GPUs; to run on CPUs, hide the GPUs, if any, and set "
            "MODEL.DEVICE to cpu on the command line."
        )


def _timeout(args: argparse.Namespace) -> timedelta:
    check_number("--rank-timeout", args.rank_timeout, 0, exclusive=True)
    return timedelta(minutes=args.rank_timeout)


def _join_torchrun(timeout: timedelta) -> None:
    variables = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set in the environment, but not {', '.join(missing)}: start the processes with torchrun, or unset it."
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} usable GPUs: start at most one process per GPU."
            )
        torch.cuda.set_device(local_rank)
    store, rank, ranks = next(torch.distributed.rendezvous("env://", timeout=timeout))
    # After a restart, torchrun may reuse its store, which still holds the addresses of the old ranks.
    store = torch.distributed.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
