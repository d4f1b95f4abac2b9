"""HTML reports: pages of sections with tables, pictures and texts. `kd_d2.report.sections` has those of trainings."""

from .page import Listing, Picture, Section, Table, render

__all__ = ["Listing", "Picture", "Section", "Table", "render"]
