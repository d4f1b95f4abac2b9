"""Robustness in numbers: mean performance under corruption (Michaelis et al. 2019, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

Metrics = dict[str, float]
CLEAN_SEVERITY = 0


@dataclass
class Robustness:
    """Metrics of a detector on clean and on corrupted images.

    Attributes:
        clean: metric by name (AP, AP50, ...), in points.
        corrupted: metrics by corruption and severity.
    """

    clean: Metrics
    corrupted: dict[str, dict[int, Metrics]] = field(default_factory=dict)

    def of_corruption(self, corruption: str, metric: str = "AP") -> float:
        """The mean over the severities of one corruption."""
        by_severity = self.corrupted[corruption].values()
        return sum(metrics[metric] for metrics in by_severity) / len(by_severity)

    def by_severity(self, corruption: str | None = None, metric: str = "AP") -> dict[int, float]:
        """The metric by severity, clean first; of one corruption, or the mean of all."""
        names = list(self.corrupted) if corruption is None else [corruption]
        severities = self.corrupted[names[0]]
        means = {s: sum(self.corrupted[name][s][metric] for name in names) / len(names) for s in severities}
        return {CLEAN_SEVERITY: self.clean[metric], **means}

    def mean(self, metric: str = "AP") -> float:
        """mPC, mean performance under corruption: the mean over corruptions of the mean over severities (equation 1)."""
        return sum(self.of_corruption(name, metric) for name in self.corrupted) / len(self.corrupted)

    def relative(self, metric: str = "AP") -> float:
        """rPC, relative performance under corruption: mPC / clean (equation 2). NaN where the clean performance is 0."""
        return self.mean(metric) / self.clean[metric] if self.clean[metric] else float("nan")
