"""The commands lore fit, add-user, score, evaluate and export: personalised reward models from files of comparisons."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.table import Table

from eigenpeft.artifacts.atomic import atomic_file, atomic_folder, check_file, check_output
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.cli.rows import feature_column, open_rows
from eigenpeft.cli.training.comparisons import read_comparisons
from eigenpeft.errors import RewardModelError
from eigenpeft.report.lore_figure import plot_evaluation
from eigenpeft.report.markup import escape
from eigenpeft.reward import LoReEvaluation, LoReFitter, LowRankRewardModel, evaluate_lore
from eigenpeft.reward.artifact.model import Unknown
from eigenpeft.reward.artifact.storage import KIND

_CLASSIFIER = "reward classifier"
_SHOWN = 20  # rows on a terminal; all are in --out and --json
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
    pairs = read_comparisons(data, user_column=user_column, cache=cache, model=model, prompt_column=prompt_column)
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
    embedder = (model.backbone, model.processing_class)
    pairs = read_comparisons(data, user_column=user_column, cache=cache, embedder=embedder, user=user)
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
def score(
    path: Annotated[str, typer.Argument(help="Folder or Hub id written by lore fit or save_pretrained.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="Rows with completion (text or messages) and perhaps prompt and the user's column; or with features: .jsonl, "
            ".csv, .parquet or a folder saved by datasets."
        ),
    ],
    user: Annotated[str | None, typer.Option(help="Whose rewards, for all rows; default: the user's column.")] = None,
    user_column: UserColumn = "user_id",
    unknown: Annotated[
        str, typer.Option(help="What an unknown user is: error, or population to score as for everybody.")
    ] = "error",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File of JSON lines to write.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score texts with the rewards of their users: a number per row, higher is liked more.

    Example: eigenpeft lore score rewards answers.jsonl --user ada

    Rewards are known up to a constant: only differences between texts of one user mean something.
    """
    quiet(as_json)
    if out is not None:
        check_file(out, overwrite=overwrite, inputs=[path, data])
    if unknown not in get_args(Unknown):
        raise RewardModelError(f"--unknown {unknown!r} must be one of {', '.join(get_args(Unknown))}.")
    model, table = LowRankRewardModel.from_pretrained(path), open_rows(data)
    if user is None and user_column not in table.column_names:
        raise RewardModelError(
            f"{str(data)!r} has no column {user_column!r}, only {sorted(table.column_names)}; name one user for all rows with "
            "--user, or the users' column with --user-column."
        )
    users = [user] * len(table) if user is not None else [str(name) for name in table[user_column]]
    rows = [
        {"user": name, "reward": value}
        for name, value in zip(users, _rewards(model, table, users, unknown=unknown, path=data), strict=True)
    ]
    if out is not None:
        with atomic_file(out, overwrite=overwrite) as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        print_json({"path": path, "rows": rows})
        return
    console.print(_score_table(table, rows))
    if len(rows) > _SHOWN and out is None:
        console.print(f"{len(rows) - _SHOWN} more rows; --out or --json has all.")
    if out is not None:
        console.print(f"Wrote {escape(str(out))}: {len(rows)} rows.")


def _rewards(model: LowRankRewardModel, table: Any, users: list[str], *, unknown: Any, path: Path) -> list[float]:
    """The reward of each row's text, or features, to its user."""
    if "features" in table.column_names:
        features = torch.as_tensor(feature_column(table, "features", path)[:])
        return model.rewards(features, users, unknown=unknown).tolist()
    if "completion" not in table.column_names:
        raise RewardModelError(
            f"{str(path)!r} has the columns {sorted(table.column_names)}; texts to score are in one called completion, or "
            "embedded in one called features."
        )
    if model.backbone is None:
        raise RewardModelError(
            "This model was fitted on features and has no backbone to embed text with: give rows with a column features."
        )
    prompts = list(table["prompt"]) if "prompt" in table.column_names else None
    reward = model.reward_func(user_column="user_id", unknown=unknown)
    return reward(completions=list(table["completion"]), prompts=prompts, user_id=users)


def _score_table(table: Any, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{len(rows)} rows, {len({row['user'] for row in rows})} users")
    for title in ("text", "user", "reward"):
        shown.add_column(title, justify="right" if title == "reward" else "left")
    for i, row in enumerate(rows[:_SHOWN]):
        text = str(table[i]["completion"]) if "completion" in table.column_names else f"row {i}"
        text = text if len(text) <= 60 else f"{text[:57]}..."
        shown.add_row(escape(text), escape(row["user"]), f"{row['reward']:.3f}")
    return shown


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
    pairs = read_comparisons(data, user_column=user_column, cache=cache, model=model, prompt_column=prompt_column)
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
