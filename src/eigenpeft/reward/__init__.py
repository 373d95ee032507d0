"""Low-rank personalised reward models (LoRe): one reward basis, a few numbers a user."""

from eigenpeft.reward.evaluation import LoReEvaluation, Share, evaluate_lore
from eigenpeft.reward.fitting import LoReFitter
from eigenpeft.reward.model import LowRankRewardModel, UserPosterior
from eigenpeft.reward.selection import Candidate
from eigenpeft.reward.users import UserTable

__all__ = [
    "Candidate",
    "LoReEvaluation",
    "LoReFitter",
    "LowRankRewardModel",
    "Share",
    "UserPosterior",
    "UserTable",
    "evaluate_lore",
]
