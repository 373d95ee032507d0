"""Combining adapters: many of them in, one out."""

from eigenpeft.combining.heads import load_head
from eigenpeft.combining.merged import MergedAdapter
from eigenpeft.combining.merging import merge
from eigenpeft.combining.report import MergeReport, SourceReport
from eigenpeft.combining.statistics import InputStatistics, collect_statistics, load_statistics, save_statistics

__all__ = [
    "InputStatistics",
    "MergeReport",
    "MergedAdapter",
    "SourceReport",
    "collect_statistics",
    "load_head",
    "load_statistics",
    "merge",
    "save_statistics",
]
