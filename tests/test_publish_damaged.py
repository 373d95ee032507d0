"""Damaged folders are refused by `push` with one message; nothing is sent."""

import pytest
import torch
from safetensors.torch import save_file

from eigenpeft.errors import ArtifactError
from eigenpeft.publish import prepare


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "cannot be read"), ("[1]", "holds list instead of a JSON object"), ("[" * 100_000, "cannot be read")],
)
def test_an_adapter_whose_config_is_damaged(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(config)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        prepare(tmp_path, repo_id="me/adapter")


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "me/base"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"README.md of .* cannot be read as UTF-8"):
        prepare(tmp_path, repo_id="me/adapter")
