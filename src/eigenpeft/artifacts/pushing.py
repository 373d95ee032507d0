"""The way of a saved artifact to the Hub, once for subspaces, stores and reward models."""

import tempfile
from abc import abstractmethod
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eigenpeft.artifacts.storage import push_folder
from eigenpeft.errors import ArtifactError


class Pushable:
    """What can be written to a folder can be uploaded.

    Attributes:
        label: What it is, for the commit's message.
    """

    label: str

    @abstractmethod
    def _write_to(self, folder: Path) -> None:
        """Write everything into a new folder; the object itself does not move there."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload to the Hub as a model repository; returns the commit's address.

        `eigenpeft push` does the same for a saved folder, looks for names of local folders first, and shows the card.

        Args:
            repo_id: `owner/name`; made when it does not exist.
            private: Visibility of a new repository.
            token: Hub token; None takes the logged-in one.
            commit_message: Message of the commit; None says what is uploaded.

        Raises:
            ArtifactError: If `repo_id` is not a name on the Hub, or a part cannot be read.
            EigenPeftError: If there is nothing to upload, such as an index without adapters.
        """
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ArtifactError(f"repo_id={repo_id!r} is not OWNER/NAME on the Hub: {error}") from error
        message = f"Upload {self.label}" if commit_message is None else commit_message
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            self._write_to(folder)
            return push_folder(folder, repo_id, private=private, token=token, message=message)
