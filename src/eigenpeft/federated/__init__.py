"""Federated training of adapters with Flower (extra `federated`); the averages themselves are in `combining.federation`."""

from importlib.util import find_spec

if find_spec("flwr") is None:
    raise ImportError("eigenpeft.federated needs Flower: pip install 'eigenpeft[federated]'.")

from eigenpeft.federated.messages import reply, start_from, to_record  # noqa: E402
from eigenpeft.federated.strategy import AdapterFedAvg  # noqa: E402

__all__ = ["AdapterFedAvg", "reply", "start_from", "to_record"]
