"""HTML reports: pages of sections with tables, pictures and texts. `kd_d2.report.sections` has those of trainings."""

from ..moved import explain_names
from .page import Listing, Picture, Section, Table, render

__all__ = ["Listing", "Picture", "Section", "Table", "render"]

__getattr__ = explain_names(__name__)
