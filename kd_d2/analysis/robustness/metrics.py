"""Robustness metrics: mean performance under corruption (Michaelis et al. 2019, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

Metrics = dict[str, float]
CLEAN_SEVERITY = 0


@dataclass
class Robustness:
    """Metrics of a detector on clean and corrupted images.

    Attributes:
        clean: metrics by name (AP, AP50, ...), in points.
        corrupted: metrics by corruption and severity.
    """

    clean: Metrics
    corrupted: dict[str, dict[int, Metrics]] = field(default_factory=dict)

    def of_corruption(self, corruption: str, metric: str = "AP") -> float:
        """Return the mean over the severities of a corruption."""
        by_severity = self.corrupted[corruption].values()
        return sum(metrics[metric] for metrics in by_severity) / len(by_severity)

    def by_severity(self, corruption: str | None = None, metric: str = "AP") -> dict[int, float]:
        """Return the metric by severity, clean first, for one corruption or averaged over all."""
        names = list(self.corrupted) if corruption is None else [corruption]
        severities = self.corrupted[names[0]]
        means = {s: sum(self.corrupted[name][s][metric] for name in names) / len(names) for s in severities}
        return {CLEAN_SEVERITY: self.clean[metric], **means}

    def mean(self, metric: str = "AP") -> float:
        """Return mPC, mean performance under corruption: the mean over corruptions and severities (equation 1)."""
        return sum(self.of_corruption(name, metric) for name in self.corrupted) / len(self.corrupted)

    def relative(self, metric: str = "AP") -> float:
        """Return rPC, relative performance under corruption: mPC / clean (equation 2), or NaN if clean is 0."""
        return self.mean(metric) / self.clean[metric] if self.clean[metric] else float("nan")
