"""Entry point of vLLM (`vllm.general_plugins`): does something only where EIGENPEFT_STORE names a store."""

import importlib
import os


def register() -> None:
    """Called by vLLM in its server and in every worker: let requests name members of the store as models.

    Raises:
        EigenPeftError: If EIGENPEFT_STORE cannot be opened, or this vLLM is not one that the plugin knows.
    """
    if os.environ.get("EIGENPEFT_STORE", "").strip():
        importlib.import_module("eigenpeft.engines.vllm_hooks").install()  # needs vLLM, which others do not have
