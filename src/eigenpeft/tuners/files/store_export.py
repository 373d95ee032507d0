"""A member of a store as the contents of a plain LoRA adapter."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from peft import TaskType
from torch import Tensor

from eigenpeft.collection.formats.keys import canonical_module
from eigenpeft.collection.formats.patterns import whole_matches
from eigenpeft.collection.formats.settings import settings_of
from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import AdapterMember, AdapterStore
from eigenpeft.tuners.files.lora_fields import KEPT
from eigenpeft.tuners.files.lora_files import LoraUpdate, lora_keys

_logger = logging.getLogger(__name__)
# Where PEFT asks for a head in the adapter's file.
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_NESTED = re.compile(r"\)[*+{]")
_MOST_REPEATS = 3
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")


def contents_of_member(store: AdapterStore, name: str) -> tuple[list[LoraUpdate], dict[str, Any], dict[str, Tensor]]:
    """What a plain LoRA adapter that gives the same logits as the member holds.

    Args:
        store: The store.
        name: Name of the member.

    Returns:
        Updates, fields of LoRA's configuration, and further tensors of the adapter's file by key: heads, biases, tokens.

    Raises:
        KeyError: If the store has no such member.
        AdapterConfigError: If the member names a task type that PEFT does not know.
        ArtifactError: If it cannot be read.
    """
    member, info = store[name], store.subspace.info
    updates = []
    for module in store.subspace:
        if module in member:
            path = member.path(module)
            lora_B, lora_A = store.subspace.reconstruct({module: member[module]})[module]
            keys = lora_keys(path, is_embedding=module in info.embeddings)
            updates.append(LoraUpdate(lora_B, lora_A, 1.0, path.replace(".base_layer", ""), keys))
    embeddings, others = _embeddings(member)
    config = {
        "task_type": member.record.get("task_type"),
        "base_model_name_or_path": member.record.get("base_model") or info.base_model_name_or_path,
        "revision": info.base_model_revision,
        "fan_in_fan_out": any(module in info.fan_in_fan_out for module in member),
        **member.config,
    }
    fields = {field: config[field] for field in KEPT if config.get(field) is not None}
    task = fields.get("task_type")
    if task is not None and task not in TaskType.__members__:
        raise AdapterConfigError(
            f"{name!r} names task_type={task!r}, which PEFT does not know; it knows {', '.join(TaskType.__members__)}. Remove "
            "that member from the store, and add its adapter again with a task type that PEFT knows."
        )
    if task in _WITH_HEAD and not others:
        lost = ", ".join(map(str, member.record.get("kept_aside") or ())) or "its head"
        _logger.warning(
            "%r is exported without a task type, because the store lacks %s: PEFT would ask for the head. Add the adapter "
            "to a store of the present format to keep it.",
            name,
            lost,
        )
        del fields["task_type"]
    written = [*updates, *embeddings]
    return written, fields | _own_targets(member, [update.target for update in written]), others


def _own_targets(member: AdapterMember, modules: Sequence[str]) -> dict[str, Any]:
    """The member's own `target_modules`, if PEFT reads exactly the member's modules in it; else nothing.

    The names in its file may be those of an older transformers, which PEFT renames in the file's tensors, but not in a list of
    full names: "q_proj" and ".*language_model.*proj" still mean the modules when their names in full do not.
    """
    config, targets = member.config, member.config.get("target_modules")
    chosen_otherwise = any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "target_parameters"))
    if member.record.get("left_out") or chosen_otherwise:
        return {}
    if isinstance(targets, str):
        # What is written is matched without a bound: only what takes no time in any library.
        is_simple = not _NESTED.search(targets) and sum(map(targets.count, "*+{")) <= _MOST_REPEATS
        try:
            fits = is_simple and len(whole_matches(targets, modules)) == len(modules)
        except ValueError:
            fits = False
        return {"target_modules": targets} if fits else {}
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return {}
    ends = {f".{target}" for target in targets}
    fits = all(any(f".{module}".endswith(end) for end in ends) for module in modules)
    return {"target_modules": targets} if fits else {}


def _embeddings(member: AdapterMember) -> tuple[list[LoraUpdate], dict[str, Tensor]]:
    """Factors of embeddings that were kept as they are because the subspace has no bases for them; and all the rest."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in member.kept_aside.items():
        if match := _EMBEDDING_FACTOR.fullmatch(key):
            pairs.setdefault(canonical_module(match["module"]), {})[match["side"]] = tensor
        else:
            others[key] = tensor
    updates = []
    for module, sides in pairs.items():
        if set(sides) != {"A", "B"}:
            raise AdapterConfigError(
                f"The member has one factor of {module!r} without the other; add its adapter again."
            )
        keys = lora_keys(module, is_embedding=True)
        settings, problems = settings_of(member.config)
        if settings is None:
            raise AdapterConfigError(f"The member's own configuration {'; it '.join(problems)}; add its adapter again.")
        updates.append(LoraUpdate(sides["B"], sides["A"], settings.scaling_of(module), module, keys))
    return updates, others
