"""KnOTS: one decomposition of all updates side by side, then an entry-wise merge of their input vectors."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.cores.spectral import triplets, weighted
from eigenpeft.linalg.rules.ties import Agreement, ties


def knots(
    cores: Float[Tensor, "t k_out n"],
    *,
    weights: Float[Tensor, " t"] | Sequence[float] | None = None,
    density: float = 0.2,
    agreement: Agreement = "mean",
) -> Float[Tensor, "k_out n"]:
    """`[M_1 ... M_T] = U S [V_1 ... V_T]`; the result is `U S ties(V_1, ..., V_T)` (KnOTS, arXiv 2410.19735, section 4).

    Defined on the entries of input vectors: pass the cores of `with_model_inputs`, on the model's own input coordinates. The
    published code forgets lora_alpha; here the updates are whole.

    Args:
        cores: Updates whose input side is not compressed.
        weights: One number per update; None for 1.
        density: As for `ties`.
        agreement: As for `ties`.

    Raises:
        ValueError: As `ties`.

    Example:
        >>> import torch
        >>> cores = torch.stack([torch.eye(2), torch.eye(2)])
        >>> torch.allclose(knots(cores, density=1.0), torch.eye(2), atol=1e-6)  # the mean of what agrees
        True
    """
    # Rows of zeros (an update of zero has no say in the common vectors) stay zeros in V_t.
    common = triplets(weighted(cores, weights).permute(1, 0, 2).flatten(1))
    own = common.Vh.unflatten(1, (len(cores), cores.shape[2])).permute(1, 0, 2)
    if not len(common.S):
        return cores[0] * 0.0
    return (common.U * common.S) @ ties(own.contiguous(), density=density, agreement=agreement)
