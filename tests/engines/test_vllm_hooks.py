"""The plugin on vLLM's interface alone; `make vllm` runs it in a real server."""

import asyncio
import importlib.metadata
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from eigenpeft.engines import vllm_plugin
from eigenpeft.errors import EigenPeftError, SubspaceNotFoundError

BASE = "tiny/base"


class NotFoundError(Exception):
    pass


class ValidationError(Exception):
    pass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name, lora_name): ...


class Registry:
    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, name, resolver):
        self.resolvers[name] = resolver


def interface():
    """Modules of vLLM 0.32 with the names that the plugin uses, as they behave there."""
    registry = Registry()

    class OpenAIServingModels:
        def __init__(self, engine_client, base_model_paths, *, lora_modules=None):
            self.lora_requests, self.n_resolved = {}, 0

        async def resolve_lora(self, lora_name):
            if lora_name in self.lora_requests:
                return self.lora_requests[lora_name]
            self.n_resolved += 1
            for resolver in registry.resolvers.values():
                request = await resolver.resolve_lora(BASE, lora_name)
                if request is not None:
                    self.lora_requests[lora_name] = request
                    return request
            return None

    class WorkerLoRAManager:
        lora_config = SimpleNamespace(max_lora_rank=16)

        def _load_adapter(self, lora_request):
            return sorted(file.name for file in Path(lora_request.lora_path).glob("[!.]*"))

    contents = {
        "vllm": {},
        "vllm.exceptions": {"VLLMNotFoundError": NotFoundError, "VLLMValidationError": ValidationError},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
        "vllm.lora.worker_manager": {"WorkerLoRAManager": WorkerLoRAManager},
        "vllm.entrypoints": {},
        "vllm.entrypoints.openai": {},
        "vllm.entrypoints.openai.models": {},
        "vllm.entrypoints.openai.models.serving": {"OpenAIServingModels": OpenAIServingModels},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(attributes)
    return modules


@pytest.fixture
def vllm(monkeypatch, tmp_path, shelf):
    modules = interface()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("EIGENPEFT_STORE", str(shelf.folder))
    monkeypatch.setenv("EIGENPEFT_CACHE_DIR", str(tmp_path / "cache"))
    yield SimpleNamespace(
        registry=modules["vllm.lora.resolver"].LoRAResolverRegistry,
        models=modules["vllm.entrypoints.openai.models.serving"].OpenAIServingModels,
        worker=modules["vllm.lora.worker_manager"].WorkerLoRAManager,
    )
    sys.modules.pop("eigenpeft.engines.vllm_hooks", None)


def server(vllm, max_lora_rank=16):
    lora_config = SimpleNamespace(max_lora_rank=max_lora_rank)
    return vllm.models(SimpleNamespace(vllm_config=SimpleNamespace(lora_config=lora_config)), [])


def ask(models, name):
    return asyncio.run(models.resolve_lora(name))


def test_a_member_is_a_model_and_is_resolved_once(vllm):
    vllm_plugin.register()
    vllm_plugin.register()  # as vLLM may, in one process
    assert list(vllm.registry.resolvers) == ["eigenpeft store"]
    models = server(vllm)
    request = ask(models, "shop/anna")
    assert vllm.worker()._load_adapter(request) == ["adapter_config.json", "adapter_model.safetensors"]
    assert ask(models, "shop/anna") is request
    assert models.n_resolved == 1


def test_an_unknown_name_is_not_found_and_names_those_near_it(vllm):
    vllm_plugin.register()
    with pytest.raises(NotFoundError, match="No adapter 'shop/ana' among the 3 .* names near it: 'shop/anna'|'anna'"):
        ask(server(vllm), "shop/ana")
    vllm.registry.register_resolver(
        "another", SimpleNamespace(resolve_lora=lambda base, name: asyncio.sleep(0, "theirs"))
    )
    assert ask(server(vllm), "shop/ana") == "theirs"


def test_a_rank_that_the_server_does_not_take_is_a_bad_request(vllm):
    vllm_plugin.register()
    with pytest.raises(ValidationError, match="'anna' has rank 3; this server takes ranks up to 1"):
        ask(server(vllm, max_lora_rank=1), "anna")


def test_another_base_model_is_a_bad_request(vllm, shelf):
    shelf.base = "other/base"
    shelf.write("anna")
    vllm_plugin.register()
    with pytest.raises(ValidationError, match="for the base model 'other/base'; this server serves 'tiny/base'"):
        ask(server(vllm), "anna")


def test_members_come_go_and_change_while_the_server_runs(vllm, shelf):
    vllm_plugin.register()
    models = server(vllm)
    first = ask(models, "anna")
    shelf.write(("anna", 7), "dora")
    assert ask(models, "dora").lora_name == "dora"
    assert ask(models, "anna").lora_path != first.lora_path
    shelf.write("dora")
    assert "anna" not in models.lora_requests
    with pytest.raises(NotFoundError, match="No adapter 'anna' among the 1"):
        ask(models, "anna")


def test_a_worker_finds_a_folder_that_the_cache_gave_up(vllm):
    vllm_plugin.register()
    request = ask(server(vllm), "anna")
    shutil.rmtree(request.lora_path)
    assert "adapter_config.json" in vllm.worker()._load_adapter(request)


def test_adapters_of_others_are_left_alone(vllm, tmp_path):
    vllm_plugin.register()
    models = server(vllm)
    (tmp_path / "theirs").mkdir()
    models.lora_requests["static"] = LoRARequest("static", 1, str(tmp_path / "theirs"))
    assert "static" in models.lora_requests
    assert vllm.worker()._load_adapter(models.lora_requests["static"]) == []


def test_without_a_store_nothing_is_imported_or_registered(vllm, monkeypatch):
    monkeypatch.setenv("EIGENPEFT_STORE", " ")
    vllm_plugin.register()
    assert list(vllm.registry.resolvers) == []
    assert "eigenpeft.engines.vllm_hooks" not in sys.modules


def test_a_store_that_is_not_there_stops_the_server_at_its_start(vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("EIGENPEFT_STORE", str(tmp_path / "nowhere"))
    with pytest.raises(SubspaceNotFoundError, match="nowhere"):
        vllm_plugin.register()


def test_another_vllm_is_refused_with_what_it_lacks(vllm):
    del vllm.worker._load_adapter
    with pytest.raises(EigenPeftError, match=r"no vllm\.lora\.worker_manager\.WorkerLoRAManager\._load_adapter"):
        vllm_plugin.register()
    assert list(vllm.registry.resolvers) == []


def test_importing_eigenpeft_does_not_need_vllm():
    code = (
        "import sys, eigenpeft.cli, eigenpeft.engines; assert not any(m.split('.')[0] == 'vllm' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def test_the_entry_point_names_the_plugin():
    points = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "eigenpeft"
    ]
    if not points:
        pytest.skip("installed before the entry point was there; install eigenpeft again")
    assert points[0].load() is vllm_plugin.register
