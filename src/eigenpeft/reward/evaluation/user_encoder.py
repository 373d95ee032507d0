"""A control: an encoder that reads a user's comparisons and gives the user's head, trained across users (after VPL)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eigenpeft.linalg.preference.objective import bradley_terry_nll

WIDTH, LATENT = 64, 8
STEPS, EVERY, USERS_A_STEP, CONTEXT, TARGETS = 400, 20, 32, 8, 8


class UserEncoder(nn.Module):
    """Head of a user: `shared + Dᵀ z_u`, `z_u = f(mean over the user's comparisons of g(difference))`.

    The encoder `q(z | comparisons)` of variational preference learning (Poddar et al., arXiv 2408.10075, abstract: "inferring a
    novel user-specific latent"), for users without weights of their own: what
    LoRe solves a convex problem for, one pass of a network guesses. Without VPL's latent noise, which is for sampling,
    and with rewards that are linear in the features, as those of the methods it is compared with.

    Args:
        shared: (n_features,) head of everybody, kept as it is.
        seed: Seed of the start.
    """

    def __init__(self, shared: Tensor, *, seed: int):
        super().__init__()
        self.register_buffer("shared", shared.float())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read = nn.Sequential(nn.Linear(len(shared), WIDTH), nn.Tanh())
            self.sum_up = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, LATENT))
            self.directions = nn.Linear(LATENT, len(shared), bias=False)
        nn.init.zeros_(self.directions.weight)  # starts at the shared head

    def heads(self, differences: Tensor, rows: Tensor, *, n_users: int) -> Tensor:
        """Heads of all users from all their comparisons; a user without any has the shared head.

        Args:
            differences: (n, n_features), scaled as in training.
            rows: (n,) user of each.
            n_users: Number of users.

        Returns:
            (n_users, n_features).
        """
        read = self.read(differences)
        counts = torch.bincount(rows, minlength=n_users)[:, None]
        means = torch.zeros(n_users, WIDTH).index_add_(0, rows, read) / counts.clamp(min=1)
        return self.shared + (counts > 0) * self.directions(self.sum_up(means))


def encoded_heads(
    differences: Tensor, rows: Tensor, *, train: Tensor, fitted: Tensor, shared: Tensor, n_users: int, seed: int
) -> Tensor:
    """Train an encoder on some users' comparisons, and read everybody's heads off it.

    A tenth of the training users choose when to stop; at the start everybody has the shared head.

    Args:
        differences: (n, n_features).
        rows: (n,) user of each.
        train: (n,) bool, the comparisons to train on.
        fitted: (n,) bool, the comparisons that a user's head is read from.
        shared: (n_features,) head for everybody.
        n_users: Number of users.
        seed: Seed of start and draws.

    Returns:
        (n_users, n_features).
    """
    scale = differences[train].square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    scaled = differences / scale
    encoder = UserEncoder(shared * scale, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    users = rows[train].unique()
    users = users[torch.randperm(len(users), generator=generator)]
    judges, learners = users[: len(users) // 10], users[len(users) // 10 :]
    order = rows[train].argsort(stable=True)
    by_user = scaled[train][order].split(torch.bincount(rows[train], minlength=n_users).tolist())
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3, weight_decay=1e-2)
    best, best_loss = copy.deepcopy(encoder.state_dict()), float("inf")
    for step in range(STEPS + 1 if len(judges) else 0):
        if step % EVERY == 0:
            with torch.no_grad():
                loss = float(_loss(encoder, by_user, judges, torch.Generator().manual_seed(seed)))
            if loss < best_loss:
                best, best_loss = copy.deepcopy(encoder.state_dict()), loss
        drawn = learners[torch.randint(len(learners), (USERS_A_STEP,), generator=generator)]
        optimizer.zero_grad()
        _loss(encoder, by_user, drawn, generator).backward()
        optimizer.step()
    encoder.load_state_dict(best)
    with torch.no_grad():
        return encoder.heads(scaled[fitted], rows[fitted], n_users=n_users) / scale


def _loss(encoder: UserEncoder, by_user: Sequence[Tensor], users: Tensor, generator: torch.Generator) -> Tensor:
    """Loss on some comparisons of each user, given others of the same user."""
    context, targets, context_rows, target_rows = [], [], [], []
    for i, user in enumerate(users.tolist()):
        mine = by_user[user][torch.randperm(len(by_user[user]), generator=generator)]
        n_context = min(CONTEXT, len(mine) // 2)
        context.append(mine[:n_context])
        targets.append(mine[n_context:][:TARGETS])
        context_rows += [i] * len(context[-1])
        target_rows += [i] * len(targets[-1])
    heads = encoder.heads(torch.cat(context), torch.tensor(context_rows, dtype=torch.long), n_users=len(users))
    margins = (torch.cat(targets) * heads[torch.tensor(target_rows, dtype=torch.long)]).sum(dim=1)
    return bradley_terry_nll(margins).mean()
