"""Stores as sources of adapters for inference engines: a vLLM plugin, and loading through a server's endpoints."""

from eigenpeft.engines.catalog import StoreCatalog
from eigenpeft.engines.lora_cache import LoraCache
from eigenpeft.engines.resolver import AdapterResolver
from eigenpeft.engines.syncing import SyncReport, sync_adapters

__all__ = ["AdapterResolver", "LoraCache", "StoreCatalog", "SyncReport", "sync_adapters"]
