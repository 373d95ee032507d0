"""The commands lore fit, add-user, evaluate and export: personalised reward models from files of comparisons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification

from eigenpeft.artifacts.atomic import atomic_folder, check_file, check_output
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.cli.rows import feature_column, naming_the_base, open_rows, open_tokenizer, without_load_reports
from eigenpeft.errors import RewardModelError
from eigenpeft.report.lore_figure import plot_evaluation
from eigenpeft.report.markup import escape
from eigenpeft.reward import LoReEvaluation, LoReFitter, LowRankRewardModel, evaluate_lore
from eigenpeft.reward.artifact.storage import KIND
from eigenpeft.reward.text.backbone import reference_head
from eigenpeft.reward.text.features import embed_preferences

_CLASSIFIER = "reward classifier"
lore = typer.Typer(
    help="Personalised reward models: one reward basis, a few numbers per user (LoRe).", no_args_is_help=True
)
app.add_typer(lore, name="lore")

Data = Annotated[
    Path,
    typer.Argument(
        help="Comparisons: .jsonl, .csv, .parquet or a folder saved by datasets, with the columns chosen, rejected, a user "
        "and perhaps prompt. Text or messages, which a backbone embeds (--model; add-user has the kept one), or lists of "
        "numbers: features."
    ),
]
Backbone = Annotated[
    str | None, typer.Option("--model", help="Reward model or encoder to embed texts with: folder or Hub id.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder to keep the features in; default: beside the data.")]
UserColumn = Annotated[str, typer.Option(help="Column that names the user of each comparison.")]
PromptColumn = Annotated[
    str | None, typer.Option(help="Column that tells prompts apart when some are held out; default: prompt, if text.")
]
NBasis = Annotated[str, typer.Option(help="Rows of the basis, or auto to choose by held-out comparisons.")]
NComponents = Annotated[int | None, typer.Option(help="Keep this many leading directions of wide features.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Comparisons as features, and where they come from."""

    chosen: Any
    rejected: Any
    user_ids: list[str]
    prompt_ids: list[str] | None
    reference: torch.Tensor | None = None
    backbone: Any = None
    processing_class: Any = None


@lore.command()
def fit(
    data: Data,
    out: Out,
    model: Backbone = None,
    n_basis: NBasis = "auto",
    n_components: NComponents = None,
    user_column: UserColumn = "user_id",
    prompt_column: PromptColumn = None,
    cache: Cache = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit a reward basis and every user's weights.

    Example: eigenpeft lore fit comparisons.jsonl --model my-reward-model --out rewards
    """
    quiet(as_json)
    check_output(out, kind=KIND, overwrite=overwrite, inputs=[data] if model is None else [data, model])
    size = _n_basis(n_basis)  # before hours of embedding
    pairs = _read(data, model, user_column, prompt_column, cache)
    fitter = LoReFitter(n_basis=size, n_components=n_components, seed=seed).fit(
        pairs.chosen,
        pairs.rejected,
        user_ids=pairs.user_ids,
        prompt_ids=pairs.prompt_ids,
        reference_head=pairs.reference,
        backbone=pairs.backbone,
        processing_class=pairs.processing_class,
        base_model=model,
    )
    found = fitter.model_
    found.save_pretrained(out, overwrite=overwrite)
    if as_json:
        print_json({"path": str(out), "n_basis": found.n_basis, "n_users": len(found.users), **found.info})
        return
    compared = any(len(one.losses) for one in fitter.candidates_)
    if compared:
        console.print(_candidate_table(fitter))
    shared = (
        f" One shared head won, the same for all users: held-out comparisons of these {len(found.users)} users gave no reason for "
        "more. `eigenpeft lore evaluate` says how sure that is."
        if compared
        else " It is one head for all users, and nothing could be held out that would say whether more pays: there are too few "
        "comparisons, or all hang together by common texts. Give more, or a number to --n-basis."
    )
    console.print(
        f"Wrote {escape(str(out))}: {found.n_basis} basis rewards, {len(found.users)} users."
        + (shared if found.n_basis == 1 and size != 1 else "")
        + (
            ""
            if found.info["converged"]
            else " The fit stopped before it converged; its last steps still changed the loss."
        )
    )


@lore.command("add-user")
def add_user(
    path: Annotated[Path, typer.Argument(help="Folder written by lore fit or save_pretrained; its users are updated.")],
    user: Annotated[str, typer.Argument(help="Id of the user; a known user is fitted anew.")],
    data: Data,
    user_column: UserColumn = "user_id",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Fit one user's weights from a few comparisons; the model's own files are not touched.

    Example: eigenpeft lore add-user rewards ada comparisons-of-ada.jsonl
    """
    quiet(as_json)
    model = LowRankRewardModel.from_pretrained(path)
    pairs = _read(data, None, user_column, None, cache, embedder=(model.backbone, model.processing_class), user=user)
    change = model.update_user if user in model.users else model.add_user
    found = change(user, chosen=pairs.chosen[:], rejected=pairs.rejected[:])
    model.save_users(path)
    if as_json:
        print_json(
            {"user": user, "n_pairs": found.n_pairs, "weights": found.weights.tolist(), "users": len(model.users)}
        )
        return
    weights = ", ".join(f"{weight:.2f}" for weight in found.weights.tolist())
    console.print(f"{escape(user)}: weights {weights} from {found.n_pairs} comparisons; {len(model.users)} users now.")


@lore.command()
def evaluate(
    data: Data,
    model: Backbone = None,
    n_basis: NBasis = "auto",
    n_components: NComponents = None,
    user_column: UserColumn = "user_id",
    prompt_column: PromptColumn = None,
    cache: Cache = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of the few-shot curve and the calibration.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Hold out users and prompts, and compare LoRe with its controls: does personalisation pay?

    Example: eigenpeft lore evaluate comparisons.jsonl --model my-reward-model
    """
    quiet(as_json)
    if plot is not None:
        check_file(plot, overwrite=overwrite, inputs=[data])
    size = _n_basis(n_basis)  # before hours of embedding
    pairs = _read(data, model, user_column, prompt_column, cache)
    found = evaluate_lore(
        pairs.chosen,
        pairs.rejected,
        user_ids=pairs.user_ids,
        prompt_ids=pairs.prompt_ids,
        reference_head=pairs.reference,
        fitter=LoReFitter(n_basis=size, n_components=n_components, seed=seed),
        seed=seed,
    )
    if plot is not None:
        plot_evaluation(found, plot, overwrite=overwrite)
    if as_json:
        print_json(found.to_dict())
        return
    console.print(_accuracy_table(found))
    console.print(_few_shot_table(found))
    console.print(found.verdict)


@lore.command("export")
def export_user(
    path: Annotated[str, typer.Argument(help="Folder or Hub id of a reward model with a backbone.")],
    out: Out,
    user: Annotated[str | None, typer.Option(help="Whose rewards; default: the population's.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one user's rewards as an ordinary one-label sequence classifier that needs no eigenpeft.

    Example: eigenpeft lore export rewards --user ada --out ada-reward-model
    """
    quiet(as_json)
    check_output(out, kind=_CLASSIFIER, overwrite=overwrite, inputs=[path])
    model = LowRankRewardModel.from_pretrained(path)
    classifier = model.to_sequence_classification(user)
    with atomic_folder(out, kind=_CLASSIFIER, overwrite=overwrite, inputs=[path]) as scratch:
        classifier.save_pretrained(scratch)
        if model.processing_class is not None:
            model.processing_class.save_pretrained(scratch)
    if as_json:
        print_json({"path": str(out), "user": user})
        return
    console.print(f"Wrote {escape(str(out))}, the rewards of {escape(user or 'the population')}.")


def _n_basis(text: str) -> Any:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise RewardModelError(f"--n-basis {text!r} must be a whole number such as 5, or auto.") from None


def _read(
    path: Path,
    model: str | None,
    user_column: str,
    prompt_column: str | None,
    cache: Path | None,
    *,
    embedder: tuple[Any, Any] = (None, None),
    user: str | None = None,
) -> Comparisons:
    """Comparisons of a file as features, embedded where they are text; of one user where one is named."""
    table = open_rows(path)
    if user is not None and user_column not in table.column_names:
        table = table.add_column(user_column, [user] * len(table))  # pyright: ignore[reportCallIssue]
    missing = {"chosen", "rejected", user_column} - set(table.column_names)
    if missing:
        raise RewardModelError(
            f"{str(path)!r} has no column {sorted(missing)}, only {sorted(table.column_names)}; name the users' "
            "column with --user-column."
        )
    if user is not None:
        rows = [row for row, name in enumerate(table[user_column]) if str(name) == user]
        if not rows:
            raise RewardModelError(f"{str(path)!r} has no comparisons of {user!r} in its column {user_column!r}.")
        table = table.select(rows)
    user_ids = _user_ids(table, user_column, path)
    prompt_column = prompt_column or ("prompt" if "prompt" in table.column_names else None)
    prompts = None if prompt_column is None else [str(prompt) for prompt in table[prompt_column]]
    first = table[0]["chosen"]
    if isinstance(first, list) and first and isinstance(first[0], int | float):
        chosen, rejected = (feature_column(table, side, path) for side in ("chosen", "rejected"))
        return Comparisons(chosen, rejected, user_ids, prompts)
    _check_texts(table, path)
    backbone, processing_class = embedder if model is None else _load(model)
    if backbone is None:
        raise RewardModelError(
            "The comparisons are text: name a reward model or an encoder to embed them with, --model."
        )
    place = cache or path.with_name(f"{path.stem}.features" + (f".{user}" if user else ""))
    features = embed_preferences(table, backbone, processing_class, cache_dir=place, user_column=user_column)
    reference = None
    if model is not None and _is_reward_model(model):
        reference = reference_head(backbone)
    return Comparisons(
        features["chosen"], features["rejected"], user_ids, prompts, reference, backbone, processing_class
    )


def _user_ids(table: Any, user_column: str, path: Path) -> list[str]:
    """The user of each row as text; a row without one is an error, as it would become a user of its own."""
    for row, name in enumerate(table[user_column]):
        if name is None or str(name) == "":
            raise RewardModelError(
                f"Row {row} of {str(path)!r} has no user in its column {user_column!r}; name the user of each comparison, or "
                "leave the row out."
            )
    return [str(name) for name in table[user_column]]


def _check_texts(table: Any, path: Path) -> None:
    """Every row must have text, or messages, on both sides."""
    for side in ("chosen", "rejected"):
        for row, value in enumerate(table[side]):
            if not isinstance(value, str | list) or not value:
                raise RewardModelError(
                    f"Row {row} of {str(path)!r} has {value!r:.60} in its column {side!r}; it must be text, a list of messages, "
                    "or a list of numbers."
                )


def _is_reward_model(name: str) -> bool:
    with naming_the_base(name):
        config = AutoConfig.from_pretrained(name)
    return config.num_labels == 1 and any(
        "ForSequenceClassification" in architecture for architecture in config.architectures or ()
    )


def _load(name: str) -> tuple[Any, Any]:
    with without_load_reports():  # a new head is expected where an encoder is named
        backbone = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    return backbone.eval(), open_tokenizer(name)


def _candidate_table(fitter: LoReFitter) -> Table:
    table = Table(title="Held-out comparisons by setting")
    for title in ("basis", "deviation scale", "concentration", "loss", "known users", "new users"):
        table.add_column(title, justify="right")
    for one in fitter.candidates_:
        table.add_row(
            str(one.setting.n_basis),
            f"{one.setting.deviation_scale:g}" if one.setting.n_basis > 1 else "",
            f"{one.setting.concentration:g}" if one.setting.n_basis > 1 else "",
            f"{one.score:.4f}",
            f"{one.seen_accuracy:.3f}",
            f"{one.unseen_accuracy:.3f}",
        )
    return table


def _accuracy_table(found: LoReEvaluation) -> Table:
    table = Table(title="Comparisons in the right order, mean over users [95 % by bootstrap of users]")
    asked = (str(share.n_users) for share in next(iter(found.accuracy.values())).values())
    table.add_column("method")
    for quadrant in found.gain:
        table.add_column(quadrant, justify="right")
    for method, shares in found.accuracy.items():
        table.add_row(method, *(f"{share.mean:.3f} \\[{share.low:.3f}, {share.high:.3f}]" for share in shares.values()))
    for name, gains in (
        ("gain over the shared head", found.gain_over_shared),
        ("gain over its population", found.gain_over_population),
    ):
        cells = (f"{share.mean:+.3f} \\[{share.low:+.3f}, {share.high:+.3f}]" for share in gains.values())
        table.add_row(name, *cells, style="bold")
    table.add_row("users asked", *asked)
    return table


def _few_shot_table(found: LoReEvaluation) -> Table:
    table = Table(title="New users by number of comparisons, on new prompts")
    for title in ("comparisons", "shared head", "LoRe", "gain over its population"):
        table.add_column(title, justify="right")
    for n, gain in found.few_shot_gain.items():
        table.add_row(
            str(n),
            f"{found.few_shot['shared head'][n].mean:.3f}",
            f"{found.few_shot['LoRe'][n].mean:.3f}",
            f"{gain.mean:+.3f} \\[{gain.low:+.3f}, {gain.high:+.3f}]",
        )
    return table
