"""From a name to a folder that an engine loads."""

import json
import shutil

import pytest
import torch
from peft import PeftModel

from eigenpeft import AdapterStore, export_lora
from eigenpeft.engines import AdapterResolver, LoraCache, StoreCatalog
from eigenpeft.errors import AdapterConfigError, EigenPeftError, UnknownAdapterError
from tests.tuners.conftest import logits, tiny_llama


def resolver(shelf, *, max_bytes=10**9, **options):
    return AdapterResolver(
        StoreCatalog([shelf.folder]), cache=LoraCache(shelf.folder.with_name("cache"), max_bytes=max_bytes), **options
    )


def resolve(adapters, name, base_model="tiny/base"):
    return adapters.resolve(name, base_model=base_model)


def test_the_folder_computes_what_the_member_does_at_a_rank_that_the_server_allows(tmp_path, shelf, tokens):
    adapters = resolver(shelf)
    path = resolve(adapters, "shop/bert")
    assert path == resolve(adapters, "bert")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 8  # of 1, 8, 16, ...
    export_lora(AdapterStore.from_pretrained(shelf.folder), tmp_path / "direct", adapter_name="bert")
    served, direct = (PeftModel.from_pretrained(tiny_llama(), folder).eval() for folder in (path, tmp_path / "direct"))
    assert direct.peft_config["default"].r == 3
    torch.testing.assert_close(logits(served, tokens), logits(direct, tokens))


@pytest.mark.parametrize(("max_rank", "padded"), [(None, 8), (4, 4), (16, 8)])
def test_padding_stops_at_the_servers_rank(shelf, max_rank, padded):
    path = resolve(resolver(shelf, max_rank=max_rank), "anna")
    assert json.loads((path / "adapter_config.json").read_text())["r"] == padded


def test_what_the_server_cannot_take_is_refused(shelf):
    with pytest.raises(AdapterConfigError, match="'anna' has rank 3; this server takes ranks up to 2"):
        resolve(resolver(shelf, max_rank=2), "anna")
    with pytest.raises(AdapterConfigError, match="is for the base model 'tiny/base'; this server serves 'other/base'"):
        resolve(resolver(shelf), "anna", base_model="other/base")
    assert list(shelf.folder.with_name("cache").glob("[0-9a-f]*")) == []


def test_other_names_of_the_base_model(tmp_path, shelf):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert resolve(resolver(shelf, base_models=["tiny/base"]), "anna", base_model="/models/tiny").is_dir()
    shelf.base = str(tmp_path / "base")
    shelf.write("anna")
    assert resolve(resolver(shelf), "anna", base_model=str(tmp_path / "link")).is_dir()


def test_a_store_that_names_no_base_model_is_served_with_a_warning(shelf, caplog):
    shelf.base = None
    shelf.write("anna")
    resolve(resolver(shelf), "anna")
    assert "does not say which base model" in caplog.text


def test_is_current_follows_the_store(shelf):
    adapters = resolver(shelf)
    paths = {name: resolve(adapters, name) for name in ("anna", "bert")}
    assert all(adapters.is_current(name, folder=path) for name, path in paths.items())
    shelf.write(("anna", 7), "carla")
    assert not adapters.is_current("anna", folder=paths["anna"])  # replaced
    assert not adapters.is_current("bert", folder=paths["bert"])  # removed
    assert resolve(adapters, "anna") != paths["anna"]
    with pytest.raises(UnknownAdapterError, match="No adapter 'bert'"):
        resolve(adapters, "bert")
    assert adapters.is_current("whatever", folder="/loras/of/somebody/else")


def test_a_folder_that_the_cache_gave_up_is_written_again_while_it_is_read(shelf):
    adapters = resolver(shelf)
    path = resolve(adapters, "anna")
    before = (path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(path)
    with adapters.present("anna", folder=path):
        assert (path / "adapter_model.safetensors").read_bytes() == before
    shutil.rmtree(path)
    shelf.write(("anna", 7))
    with (
        pytest.raises(UnknownAdapterError, match="'anna' was replaced in its store while"),
        adapters.present("anna", folder=path),
    ):
        pass
    with adapters.present("anna", folder="/loras/of/somebody/else"):
        pass


def test_the_bound_holds_with_real_adapters(shelf):
    size = sum(file.stat().st_size for file in resolve(resolver(shelf), "anna").iterdir())
    shutil.rmtree(shelf.folder.with_name("cache"))
    shelf.write("anna", "bert", "carla", "dora", "emil", "fritz")
    adapters = resolver(shelf, max_bytes=3 * size + 50_000)
    for _ in range(3):
        for name in ("anna", "bert", "carla", "dora", "emil", "fritz"):
            assert (resolve(adapters, name) / "adapter_config.json").is_file()
            assert adapters.cache.n_bytes <= 3 * size + 50_000


def test_settings_come_from_the_environment(tmp_path, shelf):
    settings = {
        "EIGENPEFT_STORE": f" {shelf.folder}, ",
        "EIGENPEFT_CACHE_DIR": str(tmp_path / "c"),
        "EIGENPEFT_CACHE_GB": "0.5",
    }
    adapters = AdapterResolver.from_environment(settings)
    assert (adapters.cache.cache_dir, adapters.cache.max_bytes) == (tmp_path / "c", 500_000_000)
    assert AdapterResolver.from_environment({"EIGENPEFT_STORE": " , "}) is None
    for size in ("0", "-1", "much", "nan", "inf"):
        with pytest.raises(EigenPeftError, match=rf"EIGENPEFT_CACHE_GB='{size}' must be a positive number"):
            AdapterResolver.from_environment(settings | {"EIGENPEFT_CACHE_GB": size})
