"""The PEFT methods; importing this package registers them with PEFT."""

from eigenpeft.collection.formats.settings import OWN_METHODS
from eigenpeft.deprecation import moved_names
from eigenpeft.tuners.controls import control_config, same_parameters_lora
from eigenpeft.tuners.eigenlora import EigenLoraConfig, EigenLoraModel
from eigenpeft.tuners.files.export import export_lora
from eigenpeft.tuners.files.gguf_files import export_gguf
from eigenpeft.tuners.files.reference_checkpoints import convert_reference_checkpoint
from eigenpeft.tuners.gated import GatedLoraConfig, GatedLoraModel
from eigenpeft.tuners.host.adapter_names import own_tensors
from eigenpeft.tuners.host.mixed_models import FactorMixedModel
from eigenpeft.tuners.host.rank_padding import has_our_factors, pad_mixers, pad_ranks
from eigenpeft.tuners.host.registration import (
    admit_to_mixed_models,
    check_lorafa,
    extend_lora,
    prepare_swapped_tensors,
    register,
    replace_name_filter,
    replace_rank_padding,
)
from eigenpeft.tuners.learning_rates import suggested_learning_rate
from eigenpeft.tuners.moslora import MosLoraConfig, MosLoraModel
from eigenpeft.tuners.parameter_groups import check_lorafa_pairs
from eigenpeft.tuners.serving.bank import AdapterBank
from eigenpeft.tuners.shardlora import ShardLoraConfig, ShardLoraModel
from eigenpeft.tuners.starts.adapters import init_lora_from_adapter, lora_config_from_adapter
from eigenpeft.tuners.starts.components import init_lora_from_subspace, lora_config_from_subspace
from eigenpeft.tuners.starts.filling import injecting

_LORA_KEYS = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "use_bdlora", "kasa_config")

register(
    "EIGENLORA",
    config_cls=EigenLoraConfig,
    model_cls=EigenLoraModel,
    hotswap_keys=(*_LORA_KEYS, "core", "n_components", "subspace_sha256"),
)
register(
    "MOSLORA",
    config_cls=MosLoraConfig,
    model_cls=MosLoraModel,
    hotswap_keys=(*_LORA_KEYS, "fold", "train_mixer"),
)
register(
    "SHARDLORA",
    config_cls=ShardLoraConfig,
    model_cls=ShardLoraModel,
    hotswap_keys=(*_LORA_KEYS, "sharing", "pool_rank", "private_rank", "shards_per_vector", "share"),
)
register(
    "GATEDLORA",
    config_cls=GatedLoraConfig,
    model_cls=GatedLoraModel,
    hotswap_keys=("lora_dropout", "n_cores", "train_cores", "gate", "top_k", "core_sizes"),
)
admit_to_mixed_models(OWN_METHODS, tuner=FactorMixedModel)
check_lorafa(check_lorafa_pairs)
extend_lora(injecting)
replace_rank_padding(pad_ranks, is_ours=has_our_factors)
prepare_swapped_tensors(pad_mixers)
replace_name_filter(own_tensors)

__all__ = [
    "AdapterBank",
    "EigenLoraConfig",
    "EigenLoraModel",
    "MosLoraConfig",
    "MosLoraModel",
    "ShardLoraConfig",
    "ShardLoraModel",
    "control_config",
    "convert_reference_checkpoint",
    "export_gguf",
    "export_lora",
    "init_lora_from_adapter",
    "init_lora_from_subspace",
    "lora_config_from_adapter",
    "lora_config_from_subspace",
    "same_parameters_lora",
    "suggested_learning_rate",
]

__getattr__ = moved_names(__name__, {"TaskBank": "eigenpeft.AdapterBank"})
