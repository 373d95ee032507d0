"""What the plugin adds to vLLM: a resolver of adapters' names, and two hooks so that its folders may come and go.

vLLM asks a resolver once for a name and then keeps the folder's path for good, so that a removed member would go on
answering, and a worker that loads an adapter again would miss a folder that the bounded cache has given up. Hence the
hooks: the server's table of adapters forgets names that the store no longer has as they were, and a worker that loads
one of our folders has it written again where it has gone. Written for vLLM 0.32; other versions are refused at the start
if they lack what is hooked.
"""

import asyncio
import importlib
import logging
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

from eigenpeft.engines.resolver import AdapterResolver
from eigenpeft.errors import EigenPeftError, UnknownAdapterError

NAME = "eigenpeft store"
logger = logging.getLogger(__name__)


class StoreResolver(LoRAResolver):
    """Members of stores as vLLM's adapters.

    Args:
        adapters: What finds and writes them.
    """

    def __init__(self, adapters: AdapterResolver):
        self.adapters = adapters

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of a name; None leaves it to other resolvers.

        Args:
            base_model_name: Base model that the server serves.
            lora_name: `STORE/MEMBER` or `MEMBER`.

        Raises:
            VLLMNotFoundError: If no store has it and there is no other resolver (the server answers 404).
            VLLMValidationError: If it cannot be served on this base model or at this rank (the server answers 400).
        """
        try:
            path = await asyncio.to_thread(self.adapters.resolve, lora_name, base_model=base_model_name)
        except UnknownAdapterError as error:
            if len(LoRAResolverRegistry.get_supported_resolvers()) > 1:
                logger.info("%s", error)
                return None
            raise VLLMNotFoundError(str(error)) from error
        except EigenPeftError as error:
            raise VLLMValidationError(str(error)) from error
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))  # vLLM gives the id


class CurrentRequests(dict):
    """The server's adapters by name, without those that the store no longer has as they were when they were resolved.

    Args:
        adapters: What finds and writes them.
        requests: What is in the table already.
    """

    def __init__(self, adapters: AdapterResolver, requests: dict[str, Any]):
        super().__init__(requests)
        self._adapters = adapters

    def __contains__(self, name: object) -> bool:
        """Whether requests for a name can be served as it is; vLLM resolves it anew where they cannot.

        Raises:
            AdapterConfigError: If the adapter's rank is now larger than the server takes.
        """
        if not super().__contains__(name):
            return False
        if self._adapters.is_current(str(name), folder=self[name].lora_path):
            return True
        del self[name]
        return False


def install() -> None:
    """Register the resolver and set the hooks; doing it twice changes nothing.

    Raises:
        EigenPeftError: If the store cannot be opened, or this vLLM lacks what is hooked.
    """
    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    adapters = AdapterResolver.from_environment()
    if adapters is None:
        return
    _hook_worker(adapters)
    _hook_server(adapters)
    LoRAResolverRegistry.register_resolver(NAME, StoreResolver(adapters))


def _hook_server(adapters: AdapterResolver) -> None:
    """Every server's table of adapters becomes one that knows the store, and the resolver learns the server's rank."""
    models = _attribute("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "resolve_lora")
    original = models.__init__

    def __init__(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        lora = getattr(getattr(engine_client, "vllm_config", None), "lora_config", None)
        adapters.max_rank = getattr(lora, "max_lora_rank", None) or adapters.max_rank
        self.lora_requests = CurrentRequests(adapters, self.lora_requests)

    models.__init__ = __init__


def _hook_worker(adapters: AdapterResolver) -> None:
    """Folders of ours are there while a worker reads them."""
    worker = _attribute("vllm.lora.worker_manager", "WorkerLoRAManager", "_load_adapter")
    original = worker._load_adapter

    def _load_adapter(self: Any, lora_request: Any) -> Any:
        adapters.max_rank = self.lora_config.max_lora_rank
        with adapters.present(lora_request.lora_name, folder=Path(lora_request.lora_path)):
            return original(self, lora_request)

    worker._load_adapter = _load_adapter


def _attribute(module: str, name: str, method: str) -> Any:
    found = getattr(importlib.import_module(module), name, None)
    if not hasattr(found, method):
        raise EigenPeftError(
            f"This vLLM has no {module}.{name}.{method}, which eigenpeft's plugin builds on; install a version that "
            "docs/serving.md names, or unset EIGENPEFT_STORE."
        )
    return found
