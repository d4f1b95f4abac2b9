"""Random states as tensors, so that a checkpoint can hold them and be read as plain data."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def get_random_state(cuda: bool = True) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in tensors and numbers.

    Args:
        cuda: whether those of the GPUs are wanted, which a process of a DataLoader must not ask for.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `get_random_state` gave. CUDA states are restored where the number of devices agrees."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(cuda: bool = True) -> Iterator[None]:
    """Leave all random states as they were, whatever happens inside.

    Args:
        cuda: see `get_random_state`.
    """
    state = get_random_state(cuda)
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Within it the random numbers of Python, NumPy and torch on the CPU follow from `seeds` alone; behind it they go on as before."""
    words = np.random.SeedSequence(seeds).generate_state(3)
    with preserved_random_state(cuda=False):
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))
        yield
