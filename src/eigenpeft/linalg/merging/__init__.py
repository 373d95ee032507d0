"""Merging updates: published rules as pure functions of cores, and the core space that they work in."""

from eigenpeft.linalg.cores.core_space import CoreSpace, core_factors, core_space, with_model_inputs
from eigenpeft.linalg.cores.moments import input_directions, moments_on_axes
from eigenpeft.linalg.cores.spectral import weighted
from eigenpeft.linalg.merging.apply import MergedUpdate, merge_updates
from eigenpeft.linalg.merging.measures import MergeMeasures, measure_merge
from eigenpeft.linalg.merging.registry import CALIBRATIONS, RULES, Rule, check_options, find_rule, merge_cores
from eigenpeft.linalg.rules.pico import norm_scale

__all__ = [
    "CALIBRATIONS",
    "RULES",
    "CoreSpace",
    "MergeMeasures",
    "MergedUpdate",
    "Rule",
    "check_options",
    "core_factors",
    "core_space",
    "find_rule",
    "input_directions",
    "measure_merge",
    "merge_cores",
    "merge_updates",
    "moments_on_axes",
    "norm_scale",
    "weighted",
    "with_model_inputs",
]
