"""Rounds of federated training of adapters: what clients send, and what a server makes of it; no transport, no Flower."""

from eigenpeft.combining.federation.averaging import AVERAGING, Averaged, average, sent_keys
from eigenpeft.combining.federation.clients import load_round, round_update
from eigenpeft.combining.federation.seeds import no_steps, train_steps
from eigenpeft.combining.federation.updates import ClientUpdate, fit_rank, keep_usable

__all__ = [
    "AVERAGING",
    "Averaged",
    "ClientUpdate",
    "average",
    "fit_rank",
    "keep_usable",
    "load_round",
    "no_steps",
    "round_update",
    "sent_keys",
    "train_steps",
]
