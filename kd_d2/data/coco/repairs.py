"""Record of the repairs to an annotation file."""

from __future__ import annotations

from collections import Counter

from ...text import printable


class Repairs:
    """Counts repairs by kind, with the first example of each.

    Args:
        path: annotation file.
    """

    def __init__(self, path: str):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, example: object) -> None:
        """Count a repair. `kind` describes it, such as "boxes without area dropped"."""
        self.counts[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = printable(str(example), 120)

    def __len__(self) -> int:
        return len(self.counts)

    def sentences(self) -> list[str]:
        """Return one sentence per kind of repair."""
        return [f"{self.path}: {kind} ({n}; the first: {self.examples[kind]})." for kind, n in self.counts.items()]
