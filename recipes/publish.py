# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]"]
# ///
"""Publish a subspace, a store or a trained adapter on the Hub, with its card; or look at what would be uploaded.

Paper:     none; the cards cite the methods.
Command:   python recipes/publish.py --folder subspace --repo_id OWNER/NAME [--private] [--dry_run]
Hardware:  any; needs a network and `hf auth login`, except with --dry_run.
Time:      that of the upload.
Expected:  with --dry_run the card and the list of files; otherwise the commit's address. The same as `eigenpeft push`.
"""

from dataclasses import dataclass, field

from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft.publish import prepare, push


@dataclass
class Arguments:
    folder: str = field(metadata={"help": "Saved subspace, store or adapter."})
    repo_id: str = field(metadata={"help": "OWNER/NAME; made when it does not exist."})
    private: bool = field(default=False)
    dry_run: bool = field(default=False, metadata={"help": "Upload nothing."})


def main(arguments: Arguments) -> None:
    publication = prepare(arguments.folder, repo_id=arguments.repo_id)
    print(publication.card)
    for name in publication.files:
        print(f"file: {name}")
    if not arguments.dry_run:
        print(push(publication, private=arguments.private))


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
