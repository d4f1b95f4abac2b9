"""One page that puts together what was found about a comparison, trainings and models."""

from .page import Listing, Picture, Section, Table, render
from .sections import (
    comparison_section,
    detections_section,
    errors_section,
    features_section,
    pictures_section,
    robustness_section,
    run_section,
)

__all__ = [
    "Listing",
    "Picture",
    "Section",
    "Table",
    "comparison_section",
    "detections_section",
    "errors_section",
    "features_section",
    "pictures_section",
    "render",
    "robustness_section",
    "run_section",
]
