"""Low-rank personalised reward models (LoRe): one reward basis, a few numbers a user."""

from eigenpeft.reward.fitting import LoReFitter
from eigenpeft.reward.model import LowRankRewardModel, UserPosterior
from eigenpeft.reward.selection import Candidate
from eigenpeft.reward.users import UserTable

__all__ = ["Candidate", "LoReFitter", "LowRankRewardModel", "UserPosterior", "UserTable"]
