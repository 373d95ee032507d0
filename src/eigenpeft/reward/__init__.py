"""Low-rank personalised reward models (LoRe): one reward basis, a few numbers a user."""

from eigenpeft.reward.model import LowRankRewardModel, UserPosterior
from eigenpeft.reward.users import UserTable

__all__ = ["LowRankRewardModel", "UserPosterior", "UserTable"]
