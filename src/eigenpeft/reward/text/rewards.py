"""From text to rewards with a backbone: joining prompts and completions, batches, one user each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError

Text = str | list[dict[str, Any]]


class TextReward:
    """A reward function in TRL's sense: `(prompts, completions, <user column>, ...) -> list of floats`.

    Args:
        backbone: Sequence classifier whose logits are the basis rewards.
        processing_class: Its tokenizer.
        weights: Gives (n, n_basis) weights for n user ids.
        user_column: Name of the keyword that brings the user ids.
        batch_size: Texts at a time.
        max_length: Longest text in tokens; None for the tokenizer's limit.
        end_token: Whether plain texts without the tokenizer's end token get it.

    Raises:
        RewardModelError: If `processing_class` is None.
    """

    def __init__(
        self,
        backbone: Any,
        processing_class: Any,
        weights: Callable[[Sequence[Any]], Tensor],
        *,
        user_column: str,
        batch_size: int,
        max_length: int | None,
        end_token: bool = False,
    ):
        if processing_class is None:
            raise RewardModelError("Rewards of texts need the backbone's tokenizer: pass processing_class=.")
        self.__name__ = f"lore_{user_column}"  # TRL logs rewards under this name
        self._backbone, self._processing_class, self._weights = backbone, processing_class, weights
        self._user_column, self._batch_size, self._max_length = user_column, batch_size, max_length
        self._end = processing_class.eos_token or "" if end_token else ""

    def __call__(
        self, *, completions: Sequence[Text], prompts: Sequence[Text] | None = None, **columns: Any
    ) -> list[float]:
        """Reward of each completion to the user of its prompt.

        Args:
            completions: Texts, or conversations.
            prompts: Likewise; None where the texts have none.
            **columns: The other columns, the user column among them.

        Raises:
            RewardModelError: If the user column is missing.
        """
        if self._user_column not in columns:
            raise RewardModelError(
                f"The reward function got no column {self._user_column!r}, only {sorted(columns)}: add it to the training "
                "set, or name another with user_column=."
            )
        if prompts is None:
            prompts = ["" if isinstance(completion, str) else [] for completion in completions]
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = join(prompt, completion, self._processing_class)
            plain = isinstance(completion, str)
            texts.append(text + self._end if plain and not text.endswith(self._end) else text)
        by_basis = classify(
            self._backbone, self._processing_class, texts, batch_size=self._batch_size, max_length=self._max_length
        )
        return (by_basis * self._weights(columns[self._user_column])).sum(dim=1).tolist()


def best_of_n(
    reward: Callable[..., list[float]],
    prompts: Sequence[Text],
    candidates: Sequence[Sequence[Text]],
    *,
    users: Sequence[Any],
) -> list[int]:
    """Index of each prompt's candidate of highest reward, all scored together.

    Args:
        reward: Takes prompts, completions and the column `user`.
        prompts: Texts or conversations.
        candidates: Completions of each prompt.
        users: User of each prompt.

    Raises:
        RewardModelError: If lengths disagree or a prompt has no candidate.
    """
    if not len(prompts) == len(candidates) == len(users):
        raise RewardModelError(
            f"{len(prompts)} prompts, {len(candidates)} lists of candidates and {len(users)} users; give one of each per prompt."
        )
    if empty := [i for i, options in enumerate(candidates) if not len(options)]:
        raise RewardModelError(f"Prompts {empty[:5]} have no candidate; give each at least one, or leave them out.")
    rows = [(i, option) for i, options in enumerate(candidates) for option in options]
    values = reward(
        prompts=[prompts[i] for i, _ in rows],
        completions=[option for _, option in rows],
        user=[users[i] for i, _ in rows],
    )
    remaining = iter(values)
    return [max(enumerate([next(remaining) for _ in options]), key=lambda one: one[1])[0] for options in candidates]


def join(prompt: Text, completion: Text, processing_class: Any) -> str:
    """One text of a prompt and its completion: put together, or through the chat template.

    Args:
        prompt: Text or conversation; empty for none.
        completion: Completion, text or messages like the prompt.
        processing_class: Tokenizer, whose template is used for conversations.

    Raises:
        RewardModelError: If one is text and the other a list of messages, or messages have no template.
    """
    if isinstance(completion, str) and isinstance(prompt, str):
        return prompt + completion
    if isinstance(completion, str) or isinstance(prompt, str) and prompt:
        raise RewardModelError("A prompt and its completion must both be text, or both be lists of messages.")
    if not getattr(processing_class, "chat_template", None):
        raise RewardModelError(
            "The texts are lists of messages, and the tokenizer has no chat template that would join them; give plain text, or "
            "take a model whose tokenizer has one."
        )
    return processing_class.apply_chat_template([*(prompt or []), *completion], tokenize=False)


def agree_on_padding(model: Any, processing_class: Any) -> None:
    """Give a tokenizer and a model without a padding token the end token, and refuse two that differ.

    A decoder reads its reward from the last token that is not padding, by the model's own number of the padding token:
    where the tokenizer pads with another one, it would read padding.

    Args:
        model: Its `config.pad_token_id` is set where it is None.
        processing_class: Its tokenizer; `pad_token` is set to `eos_token` where it is None.

    Raises:
        RewardModelError: If the two numbers differ, or there is no end token to pad with.
    """
    if processing_class.pad_token is None:
        if processing_class.eos_token is None:
            raise RewardModelError(
                f"{type(processing_class).__name__} has neither a padding token nor an end token; set its pad_token."
            )
        processing_class.pad_token = processing_class.eos_token
    known = getattr(model.config, "pad_token_id", None)
    if known is None:
        model.config.pad_token_id = processing_class.pad_token_id
    elif known != processing_class.pad_token_id:
        raise RewardModelError(
            f"The tokenizer pads with {processing_class.pad_token!r} (number {processing_class.pad_token_id}), the model's "
            f"config names number {known} as pad_token_id: a text's features would depend on its batch. Set one to the other."
        )


@torch.no_grad()
def classify(
    model: Any,
    processing_class: Any,
    texts: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None = None,
) -> Tensor:
    """Logits of texts, batched by like length, in the order given.

    Args:
        model: Sequence classifier.
        processing_class: Its tokenizer; without a padding token it pads with the end token.
        texts: Texts.
        batch_size: Texts at a time.
        max_length: Longest text in tokens; longer ones lose their beginning, as the last token is what is read. None
            for the tokenizer's limit.

    Returns:
        (n, num_labels) float32 on the CPU.

    Raises:
        RewardModelError: If model and tokenizer pad with different tokens, or there is none to pad with.
    """
    agree_on_padding(model, processing_class)
    was_training = model.training
    model.eval()
    side = processing_class.truncation_side
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "classifier"):
        processing_class.truncation_side = "left"
    try:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result: Tensor | None = None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = processing_class(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(model.device)
            logits = model(**batch).logits.float().cpu()
            result = torch.zeros(len(texts), logits.shape[1]) if result is None else result
            result[rows] = logits
    finally:
        processing_class.truncation_side = side
        model.train(was_training)
    return torch.zeros(0, model.config.num_labels) if result is None else result
