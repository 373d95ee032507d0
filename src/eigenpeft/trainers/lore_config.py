"""Settings of LoReTrainer: those of TRL's RewardConfig and a few of its own."""

from dataclasses import dataclass, field

from trl.trainer.reward_config import RewardConfig


@dataclass
class LoReConfig(RewardConfig):
    """Configuration of `LoReTrainer`; every argument of `trl.RewardConfig` and `transformers.TrainingArguments` works.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> LoReConfig("out", n_basis=3, use_cpu=True, bf16=False).user_column
        'user_id'
    """

    n_basis: int = field(
        default=5,
        metadata={
            "help": "Rows of the reward basis. The paper (arXiv 2504.14439) sweeps 1 to 50; 5 is chosen here: choose by "
            "held-out comparisons."
        },
    )
    user_column: str = field(default="user_id", metadata={"help": "Column that names the user of each comparison."})
    user_learning_rate: float = field(
        default=0.05,
        metadata={
            "help": "Learning rate of the user logits, which have to travel a few units; the rest takes `learning_rate`. "
            "0.05 is chosen here."
        },
    )
    concentration: float = field(
        default=1.0,
        metadata={
            "help": "Dirichlet pseudo-counts of each user's weights, spread evenly; keeps users with few comparisons near "
            "the middle. 0 for none; 1 is chosen here."
        },
    )
    strength: float = field(
        default=1.0,
        metadata={
            "help": "How many comparisons' worth the population's weights weigh for new users of the finished model; "
            "1 is chosen here, and `eigenpeft.reward.LoReFitter` chooses it by held-out comparisons."
        },
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={
            "help": "Train the basis and the users alone. For a frozen backbone `eigenpeft.reward.LoReFitter` on cached "
            "features is faster and better; this is for comparison."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, is_allowed, rule in (
            ("n_basis", self.n_basis >= 1, "at least 1; 1 gives all users one reward"),
            ("user_learning_rate", self.user_learning_rate > 0, "above 0; leave it out for 0.05"),
            ("concentration", self.concentration >= 0, "at least 0; 0 leaves the prior out"),
            ("strength", self.strength > 0, "above 0; the smaller, the fewer comparisons move a new user"),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range: it must be {rule}.")
