"""Stores of tiny adapters on disk, which tests change while they are being served."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder
from tests.tuners.conftest import tiny_llama
from tests.tuners.conftest import tokens as tokens


class Shelf:
    """A store in a folder, written anew with other members."""

    def __init__(self, folder, *, base="tiny/base", rank=3):
        self.folder, self.base, self.rank = folder, base, rank

    def write(self, *members):
        """Members by name; a pair (name, seed) gives another adapter under that name."""
        pairs = [(member, i) if isinstance(member, str) else member for i, member in enumerate(members)]
        adapters = self.folder.with_name(f"{self.folder.name}-adapters-{len(list(self.folder.parent.iterdir()))}")
        for name, seed in pairs:
            model = get_peft_model(
                tiny_llama(),
                LoraConfig(r=self.rank, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            )
            generator = torch.Generator().manual_seed(seed)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data = torch.randn(parameter.shape, generator=generator)
            model.peft_config["default"].base_model_name_or_path = self.base
            model.save_pretrained(adapters / name, save_embedding_layers=False)
        with AdapterCollection.from_pretrained([adapters / name for name, _ in pairs]) as collection:
            subspace = SubspaceBuilder(3).fit(collection).subspace_
            AdapterStore.from_collection(subspace, collection).save_pretrained(self.folder, overwrite=True)
        return self


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "shop").write("anna", "bert", "carla")
