"""Low-rank personalised reward models (LoRe): one reward basis, a few numbers per user."""

from typing import TYPE_CHECKING

from eigenpeft.deprecation import moved_names
from eigenpeft.lazy import lazy_names
from eigenpeft.reward.artifact.model import LowRankRewardModel, UserPosterior
from eigenpeft.reward.artifact.users import UserTable
from eigenpeft.reward.evaluation.evaluate import LoReEvaluation, evaluate_lore
from eigenpeft.reward.evaluation.intervals import Share
from eigenpeft.reward.evaluation.simulation import SimulatedUsers
from eigenpeft.reward.fitting.fitter import LoReFitter
from eigenpeft.reward.fitting.selection import LoReCandidate

if TYPE_CHECKING:
    from eigenpeft.reward.text.features import embed_preferences

__all__ = [
    "LoReCandidate",
    "LoReEvaluation",
    "LoReFitter",
    "LowRankRewardModel",
    "Share",
    "SimulatedUsers",
    "UserPosterior",
    "UserTable",
    "embed_preferences",
    "evaluate_lore",
]

# What embeds text imports datasets, which those with features of their own need not wait for.
__getattr__ = lazy_names(
    __name__, {"embed_preferences": "eigenpeft.reward.text.features"}, otherwise=moved_names(__name__, {})
)
