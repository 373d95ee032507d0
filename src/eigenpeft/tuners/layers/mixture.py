"""The output factor of a mixture: frozen cores under trained weights, of one module or of the whole model."""

from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.subspace.cores import CORES
from eigenpeft.tuners.layers.embedding import ActsAsMatrix
from eigenpeft.tuners.layers.linear import OutputFactor
from eigenpeft.tuners.layers.shared_bases import FrozenBank


class MixtureWeights(nn.Module):
    """One trained weight per source; the factors of all modules may have the same one as a submodule.

    A module rather than a parameter, so that it stays one where PEFT replaces parameters as it loads a file. Each factor
    writes and reads it under a name of its own (`MixtureFactor`), as if it were that factor's alone.

    Args:
        weights: (T,).
    """

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class MixtureFactor(OutputFactor):
    """`B = V_outᵀ (Σ_t w_t M_t)`, (out_features, K_in).

    Args:
        frozen_bank: Where the components live; not a submodule of this one.
        mixing: The weights w.
        cores: The frozen M_t, (T, K_out, K_in).
        bias: As for `OutputFactor`.
        offset: As for `OutputFactor`.
    """

    cores: Tensor

    def __init__(
        self,
        frozen_bank: FrozenBank,
        *,
        mixing: MixtureWeights,
        cores: Tensor,
        bias: nn.Parameter | None = None,
        offset: Tensor | None = None,
    ):
        nn.Module.__init__(self)  # without the one coefficient tensor of the other cores
        self.mixing = mixing
        self.register_buffer("cores", cores)
        self._stand_on(frozen_bank, rank=cores.shape[-1], bias=bias, offset=offset)

    @property
    def weights(self) -> nn.Parameter:
        """The weights, (T,), which other modules may have too."""
        return self.mixing.weights

    @property
    def coefficients(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """M (K_out, K_in), in the weights' dtype."""
        weights = self.mixing.weights.to(self.cores.device)
        return CORES["mixture"].to_dense({"weights": weights, "cores": self.cores.to(weights.dtype)})

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers sets the parameters that it reads by the names that they have in files.
        if name == "weights":
            self.mixing.weights = value
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy: files have no two names for one tensor.
        destination[f"{prefix}weights"] = self.weights if keep_vars else self.weights.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*found)
        key = f"{prefix}weights"
        unexpected_keys[:] = [name for name in unexpected_keys if name != key]
        value = state_dict.get(key)
        if value is None:
            missing_keys.append(key)
        elif value.shape != self.weights.shape:
            error_msgs.append(
                f"size mismatch for {key}: {tuple(value.shape)} in the file, {tuple(self.weights.shape)} here."
            )
        elif local_metadata.get("assign_to_params_buffers"):
            self.mixing.weights = nn.Parameter(value.detach(), requires_grad=self.weights.requires_grad)
        else:
            with torch.no_grad():
                self.weights.copy_(value)


class EmbeddingMixtureFactor(ActsAsMatrix, MixtureFactor):
    """`MixtureFactor` where LoRA keeps a bare matrix."""
