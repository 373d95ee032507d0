"""Recycle what pays: from adapters, a base model and rows of a new task to the best adapter within a budget."""

from eigenpeft.recycling.candidates import CANDIDATES
from eigenpeft.recycling.report import RecycleReport, Trial
from eigenpeft.recycling.run import recycle

__all__ = ["CANDIDATES", "RecycleReport", "Trial", "recycle"]
