# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Build a principal subspace from LoRA adapters, and put the adapters themselves into it.

Paper:     EigenLoRAx, arXiv 2502.04700; joint bases: Compress then Serve, arXiv 2407.00066.
Command:   python recipes/build_subspace.py --config recipes/build_subspace.yaml --adapters DIR_OR_HUB_ID ... --out OUT
Hardware:  any CPU; the adapters are read one weight at a time, no base model is loaded.
Time:      seconds for the ten adapters that ship with eigenpeft.
Expected:  OUT/subspace and OUT/store, each with a model card, and one line per adapter: how much of its update is lost.

The loss printed is that of adapters the subspace was built from. It does not say that a new task trains well in it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder


@dataclass
class Arguments:
    adapters: list[str] = field(
        metadata={"help": "Adapter folders, folders of adapter folders, or Hub ids, in any mix."}
    )
    out: str = field(default="recycled", metadata={"help": "Folder for `subspace` and `store`."})
    n_components: int = field(default=32, metadata={"help": "Components of each side of each weight."})
    method: Literal["balanced", "hosvd", "hooi", "eigenlorax", "paired"] = field(default="balanced")
    weighting: Literal["equal", "none"] = field(default="equal")
    allow_different_base_models: bool = field(default=False)


def main(arguments: Arguments) -> None:
    with AdapterCollection.from_pretrained(
        arguments.adapters, allow_different_base_models=arguments.allow_different_base_models
    ) as collection:
        builder = SubspaceBuilder(arguments.n_components, method=arguments.method, weighting=arguments.weighting)
        subspace = builder.fit(collection).subspace_
        store = AdapterStore.from_collection(subspace, collection)
    subspace.save_pretrained(Path(arguments.out) / "subspace")
    store.save_pretrained(Path(arguments.out) / "store")
    for finding in builder.findings_:
        print(f"noticed: {finding}")
    for name in store.names:
        errors = [of_module[name] for of_module in store.relative_errors.values() if name in of_module]
        print(
            f"{name}: relative error of its updates {sum(errors) / len(errors):.3f} (mean over {len(errors)} weights)"
        )
    print(f"{subspace}\nWrote {arguments.out}/subspace and {arguments.out}/store ({store.n_bytes / 1e6:.2f} MB).")


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
