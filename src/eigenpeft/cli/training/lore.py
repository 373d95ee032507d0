"""The commands lore fit, add-user, score, evaluate and export: personalised reward models from files of comparisons."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from eigenpeft.artifacts.atomic import atomic_folder, check_file, check_output
from eigenpeft.cli.app import Json, Out, Overwrite, app, console, print_json, quiet
from eigenpeft.cli.row_results import replaced_columns, show_rows, with_input, write_rows
from eigenpeft.cli.rows import open_rows
from eigenpeft.cli.training.comparisons import read_comparisons
from eigenpeft.cli.training.lore_scores import ALL_ALIKE, best_of_each, check_known, rewards_of, score_table, users_of
from eigenpeft.errors import RewardModelError
from eigenpeft.report.lore_figure import check_plots, plot_evaluation
from eigenpeft.report.lore_tables import accuracy_table, candidate_table, few_shot_table
from eigenpeft.report.markup import escape
from eigenpeft.reward import LoReFitter, LowRankRewardModel, evaluate_lore
from eigenpeft.reward.artifact.model import Unknown
from eigenpeft.reward.artifact.storage import KIND

_CLASSIFIER = "reward classifier"
lore = typer.Typer(
    help="Personalised reward models: one reward basis, a few numbers per user (LoRe).", no_args_is_help=True
)
app.add_typer(lore, name="lore")

Dataset = Annotated[
    Path,
    typer.Argument(
        help="Comparisons: .jsonl, .csv, .parquet or a folder saved by datasets, with the columns chosen, rejected, user_id "
        "(or --user-column) and perhaps prompt. Text or messages, which a backbone embeds (--model; add-user has the kept "
        "one), or lists of numbers: features."
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
NComponents = Annotated[int | None, typer.Option(min=1, help="Keep this many leading directions of wide features.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@lore.command()
def fit(
    dataset: Dataset,
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
    check_output(out, kind=KIND, overwrite=overwrite, inputs=[dataset] if model is None else [dataset, model])
    size = _n_basis(n_basis)  # before hours of embedding
    pairs = read_comparisons(dataset, user_column=user_column, cache=cache, model=model, prompt_column=prompt_column)
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
        console.print(candidate_table(fitter))
    shared = (
        " One shared head won, the same for all users: no basis of several rows predicted the held-out comparisons better by two "
        "standard errors. `eigenpeft lore evaluate` says what a basis of several rows would bring to users, and how sure that is."
        if compared
        else " It is one head for all users, and nothing could be held out that would say whether more pays: there are too few "
        "comparisons, or all hang together by common texts. Give more, or a number to --n-basis."
    )
    console.print(
        f"Wrote {escape(str(out))}: {found.n_basis} basis reward{'s' if found.n_basis > 1 else ''}, {len(found.users)} users."
        + (shared if found.n_basis == 1 and size != 1 else "")
        + (
            ""
            if found.info["converged"]
            else " The fit stopped before it converged; its last steps still changed the loss."
        )
    )


@lore.command("add-user")
def add_user(
    reward_model: Annotated[
        Path, typer.Argument(help="Folder written by lore fit or save_pretrained; its users are updated.")
    ],
    user: Annotated[str, typer.Argument(help="Id of the user; a known user is fitted anew.")],
    dataset: Dataset,
    user_column: UserColumn = "user_id",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Fit one user's weights from a few comparisons; the model's own files are not touched.

    Example: eigenpeft lore add-user rewards ada comparisons-of-ada.jsonl
    """
    quiet(as_json)
    model = LowRankRewardModel.from_pretrained(reward_model)
    embedder = (model.backbone, model.processing_class)
    pairs = read_comparisons(dataset, user_column=user_column, cache=cache, embedder=embedder, user=user)
    known = user in model.users
    change = model.update_user if known else model.add_user
    found = change(user, chosen=pairs.chosen[:], rejected=pairs.rejected[:])
    model.save_users(reward_model)
    if as_json:
        print_json(
            {
                "user": user,
                "n_pairs": found.n_pairs,
                "weights": found.user_weights.tolist(),
                "users": len(model.users),
                "was_known": known,
                "n_basis": model.n_basis,
            }
        )
        return
    weights, common = (
        ", ".join(f"{weight:.2f}" for weight in each.tolist())
        for each in (found.user_weights, model.population_weights)
    )
    anew = ", which was known and is fitted anew" if known else ""
    console.print(
        f"{escape(user)}{anew}: weights {weights} from {found.n_pairs} comparisons (of a user who gave none: {common}); "
        f"{len(model.users)} users now."
    )
    if model.n_basis == 1:
        console.print(ALL_ALIKE)


@lore.command()
def score(
    reward_model: Annotated[str, typer.Argument(help="Folder or Hub id written by lore fit or save_pretrained.")],
    dataset: Annotated[
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
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep this many rows of each user, the best first; default: all, as they come."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File of JSON lines to write.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score texts with the rewards of their users: a number per row, higher is liked more.

    Example: eigenpeft lore score rewards answers.jsonl --user ada

    A result has the row's number, from 0, the data's own columns but for features, the user and the reward. Rewards are known up
    to a constant: only differences between texts of one user mean something.
    """
    quiet(as_json)
    if out is not None:
        check_file(out, overwrite=overwrite, inputs=[reward_model, dataset])
    if unknown not in get_args(Unknown):
        raise RewardModelError(f"--unknown {unknown!r} must be one of {', '.join(get_args(Unknown))}.")
    model, table = LowRankRewardModel.from_pretrained(reward_model), open_rows(dataset)
    users = users_of(table, user, user_column, path=dataset)
    refused = "score as for everybody with --unknown population" if unknown == "error" else ""
    strangers = check_known(model, users, otherwise=refused)
    values = rewards_of(model, table, users, unknown=cast(Unknown, unknown), path=dataset)
    results = [{"user": name, "reward": value} for name, value in zip(users, values, strict=True)]
    rows = with_input(table, results, without=["features"])
    rows = rows if top_k is None else best_of_each(rows, top_k)
    write_rows(rows, out, overwrite=overwrite)
    replaced = [name for name in replaced_columns(table, results) if name != user_column]
    if as_json:
        print_json(
            {
                "path": reward_model,
                "n_basis": model.n_basis,
                "unknown": strangers,
                "replaced_columns": replaced,
                "rows": rows,
            }
        )
        return
    show_rows(score_table(rows), rows, out)
    if strangers:
        are = "user is" if len(strangers) == 1 else "users are"
        names = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
        console.print(f"{len(strangers)} {are} unknown and scored as everybody: {escape(names)}.")
    if replaced:
        console.print(f"The data's own columns {escape(', '.join(replaced))} are left out: results have these names.")
    if model.n_basis == 1:
        console.print(ALL_ALIKE)


@lore.command()
def evaluate(
    dataset: Dataset,
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
    """Hold out users and prompts (without prompts, texts), and compare LoRe with its controls: does personalisation pay?

    Example: eigenpeft lore evaluate comparisons.jsonl --model my-reward-model
    """
    quiet(as_json)
    if plot is not None:
        check_file(plot, overwrite=overwrite, inputs=[dataset])
        check_plots()
    size = _n_basis(n_basis)  # before hours of embedding
    pairs = read_comparisons(dataset, user_column=user_column, cache=cache, model=model, prompt_column=prompt_column)
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
    console.print(accuracy_table(found))
    console.print(few_shot_table(found))
    console.print(found.verdict)


@lore.command("export")
def export_user(
    reward_model: Annotated[str, typer.Argument(help="Folder or Hub id of a reward model with a backbone.")],
    out: Out,
    user: Annotated[str | None, typer.Option(help="Whose rewards; default: the population's.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one user's rewards as an ordinary one-label sequence classifier that needs no eigenpeft.

    Example: eigenpeft lore export rewards --user ada --out ada-reward-model
    """
    quiet(as_json)
    check_output(out, kind=_CLASSIFIER, overwrite=overwrite, inputs=[reward_model])
    model = LowRankRewardModel.from_pretrained(reward_model)
    if user is not None:
        check_known(model, [user], otherwise="leave out --user for the population's rewards")
    if model.backbone is None:
        raise RewardModelError(
            f"{reward_model!r} was fitted on features and has no backbone, so that there is no classifier to write; fit it on "
            "text with `eigenpeft lore fit --model`."
        )
    classifier = model.to_sequence_classification(user)
    with atomic_folder(out, kind=_CLASSIFIER, overwrite=overwrite, inputs=[reward_model]) as scratch:
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
