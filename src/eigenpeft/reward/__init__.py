"""Low-rank personalised reward models (LoRe): one reward basis, a few numbers per user."""

from eigenpeft.reward.artifact.model import LowRankRewardModel, UserPosterior
from eigenpeft.reward.artifact.users import UserTable
from eigenpeft.reward.evaluation.evaluate import LoReEvaluation, evaluate_lore
from eigenpeft.reward.evaluation.intervals import Share
from eigenpeft.reward.evaluation.simulation import SimulatedUsers
from eigenpeft.reward.fitting.fitter import LoReFitter
from eigenpeft.reward.fitting.selection import LoReCandidate

__all__ = [
    "LoReCandidate",
    "LoReEvaluation",
    "LoReFitter",
    "LowRankRewardModel",
    "Share",
    "SimulatedUsers",
    "UserPosterior",
    "UserTable",
    "evaluate_lore",
]
