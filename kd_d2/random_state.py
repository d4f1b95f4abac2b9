"""Random states as tensors and plain values, which checkpoints can store safely."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def get_random_state(cuda: bool = True) -> dict[str, Any]:
    """Return the states of the random number generators of Python, NumPy and torch as tensors and plain values.

    Args:
        cuda: whether to include the GPUs; must be False in DataLoader workers.
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
    """Restore a state from `get_random_state`. CUDA states are restored if the number of devices is the same."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_random_state(cuda: bool = True) -> Iterator[None]:
    """Restore all random states on exit.

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
    """Seed Python, NumPy and torch on the CPU from `seeds` within this context; restore their states on exit."""
    words = np.random.SeedSequence(seeds).generate_state(3)
    with preserved_random_state(cuda=False):
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would also seed the GPUs
        yield
