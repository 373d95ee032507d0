"""The model card of a low-rank reward model: complete without editing."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from eigenpeft.artifacts.plain_text import for_card
from eigenpeft.collection.base_models import hub_id

_WITH_BACKBONE = """The folder is a stock sequence classifier with {labels}, one per row of the basis; every server of
classifiers can serve it (switch the activation off: the logits are the basis rewards)."""
_WITHOUT_BACKBONE = """The basis stands alone: it takes features of width {n_features} of the base model."""
_USERS_ARE_IN = """The ids and weights of its users are in `lore_users.safetensors`: personal data if the ids are. Delete that
file's users with `remove_user` before publishing what is not meant to be public."""

_NOT_EVALUATED = "Not evaluated against its controls; run `eigenpeft lore evaluate` before relying on it."


def reward_card(
    info: Mapping[str, Any], *, n_basis: int, n_features: int, population: list[float], backbone: bool
) -> str:
    """Text of README.md. It does not count the users: their table changes without it.

    Args:
        info: What the fit recorded: base model, pairs, seed, held-out results.
        n_basis: Rows of the basis.
        n_features: Width of the features.
        population: Weights of a user without history.
        backbone: Whether the classifier is in the folder.
    """
    data = ModelCardData(
        base_model=hub_id(str(info["base_model"])) if info.get("base_model") else None,
        library_name="eigenpeft",
        pipeline_tag="text-classification" if backbone else None,
        tags=["eigenpeft", "reward-model", "personalization", "lore"],
    )
    facts = "".join(
        f"| {for_card(key.replace('_', ' '))} | {for_card(value)} |\n"
        for key, value in info.items()
        if not isinstance(value, dict | list) and key not in ("n_basis", "verdict")
    )
    verdict = info.get("verdict")
    told = for_card(verdict) if verdict else _NOT_EVALUATED
    labels = f"{n_basis} label{'s' if n_basis > 1 else ''}"
    alike = "" if n_basis > 1 else "\nThere is one row, a head that all users share: their rewards are the same."
    body = f"""# Low-rank reward model: {n_basis} basis reward{"s" if n_basis > 1 else ""}

The reward of user u is `w_u @ (reward_basis @ features)` with `w_u` on the simplex (LoRe, arXiv 2504.14439). A user without
history has the population's weights {[round(weight, 3) for weight in population]}.{alike}
{(_WITH_BACKBONE if backbone else _WITHOUT_BACKBONE).format(labels=labels, n_features=n_features)}

{told}

## How to load it

```python
import eigenpeft  # pip install eigenpeft

model = eigenpeft.LowRankRewardModel.from_pretrained("<this repository or its local path>")
model.reward_head()  # (n_features,), the population's; reward_head("a user") is that user's
```

{_USERS_ARE_IN}

## Facts

| | |
|---|---|
| n basis | {n_basis} |
| n features | {n_features} |
{facts}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def without_users(card: str) -> str:
    """The card of a model whose table of users is emptied before it is sent.

    Args:
        card: From `reward_card`; what its reader has changed stays.
    """
    return card.replace(_USERS_ARE_IN, "Its users' weights were not published: everybody starts with the population's.")
