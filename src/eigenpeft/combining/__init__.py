"""Combining adapters: many of them in, one out."""

from eigenpeft.combining.heads import load_head
from eigenpeft.combining.merged import MergedAdapter
from eigenpeft.combining.merging import merge
from eigenpeft.combining.report import MergeReport, SourceReport
from eigenpeft.combining.starting import choose_scale, init_lora_from_merge, merged_start
from eigenpeft.combining.statistics import InputStatistics, collect_statistics, load_statistics, save_statistics

__all__ = [
    "InputStatistics",
    "MergeReport",
    "MergedAdapter",
    "SourceReport",
    "choose_scale",
    "collect_statistics",
    "init_lora_from_merge",
    "load_head",
    "load_statistics",
    "merge",
    "merged_start",
    "save_statistics",
]
