"""tuna eval and tuna audit"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuna_model.cli.options import load, with_model

if TYPE_CHECKING:
    from tuna_model.evaluation import Task
    from tuna_model.evaluation.run import Answerer

_PATH = click.Path(path_type=Path)
TASK_NAMES = ("pope", "mme", "vqa", "captions", "chair", "llava-bench", "naming", "choice", "edits")


def with_task(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add TASK, its files and settings."""
    for option in reversed(
        (
            click.argument("task", type=click.Choice(TASK_NAMES)),
            click.option(
                "--data",
                type=_PATH,
                required=True,
                help="Questions (JSON lines, TSV), or captioned images (JSON lines, WebDataset).",
            ),
            click.option(
                "--images",
                type=_PATH,
                help="Directory that image names are relative to; that of --data if not given.",
            ),
            click.option(
                "--allow-outside",
                is_flag=True,
                help="Read images whose path leads out of --data's folder, or of --images.",
            ),
            click.option("--labels", type=_PATH, help="pope: RePOPE's corrected labels."),
            click.option("--synonyms", type=_PATH, help="chair: the paper's synonym list."),
            click.option("--split", default="", help="Only questions or captioned images of this split."),
            click.option("--limit", default=0, help="Only so many questions; 0 for all."),
            click.option("--prompt", default="", help="Instead of the task's own."),
            click.option(
                "--resamples", default=1000, show_default=True, help="Of the bootstrap; 0 for no intervals."
            ),
            click.option(
                "--seed", default=0, show_default=True, help="Of the bootstrap, and of tags that are drawn."
            ),
            click.option(
                "--max-tokens", default=0, help="The answers' length at most; the task's own if not given."
            ),
            click.option("--batch", default=8, show_default=True, help="Questions answered together."),
            click.option(
                "--out", type=_PATH, help="Directory for answers (JSON lines) and figures (JSON, Markdown)."
            ),
            click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown."),
        )
    ):
        command = option(command)
    return command


@click.command()
@with_task
@with_model
@click.option(
    "--tokeniser",
    type=click.Choice(("plain", "ptb")),
    default="plain",
    show_default=True,
    help="captions: ptb needs Java.",
)
@click.option("--meteor", is_flag=True, help="captions: METEOR too; needs Java.")
@click.option(
    "--before", type=_PATH, help="edits: the --out of the same questions with the store before its edit."
)
@click.option("--references", type=_PATH, help="llava-bench: reference answers.")
@click.option("--contexts", type=_PATH, help="llava-bench: descriptions of the images for the judge.")
@click.option(
    "--judge",
    metavar="URL",
    help="llava-bench: an OpenAI-compatible endpoint, with /v1; without one answers are only written.",
)
@click.option("--judge-model", default="gpt-4o", show_default=True, help="What the endpoint calls its model.")
@click.option(
    "--served-model",
    metavar="NAME",
    default="",
    help="--model is an endpoint: the name of its model; its only one if not given.",
)
@click.option("--no-pictures", is_flag=True, help="--model is an endpoint: ask it with the words alone.")
def eval(
    model: str, store: str, batch: int, out: Path | None, as_json: bool, judge: str | None, judge_model: str,
    served_model: str, no_pictures: bool, **options: Any,
) -> None:  # fmt: skip
    """Run the benchmark TASK. A run that was cut off resumes from the answers in --out.

    --model may also be an endpoint of OpenAI's chat completions, http://HOST:PORT/v1: any served model,
    bare or behind `tuna proxy`. OPENAI_API_KEY is sent if it is set.
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from tuna_model.evaluation import evaluate as run
    from tuna_model.evaluation import markdown
    from tuna_model.evaluation.answerer import PipelineAnswerer
    from tuna_model.evaluation.chat_endpoint import ChatEndpoint
    from tuna_model.evaluation.judge import OpenAIJudge

    before = options["before"]
    if before is not None and out is not None and before.resolve() == out.resolve():
        raise click.UsageError("--out would replace the answers in --before: name another directory")
    task = _load_task(options, judge=OpenAIJudge(ChatEndpoint(judge, judge_model)) if judge else None)
    answerer: Answerer
    if is_endpoint(model):
        answerer = _endpoint(model, served_model, not no_pictures)
    elif served_model or no_pictures:
        raise click.UsageError(f"--served-model and --no-pictures are for endpoints, and --model is {model}")
    else:
        answerer = PipelineAnswerer(load(model, store, **options), name=model, store=store)
    with Progress(transient=True) as bar:
        row = bar.add_task(task.name, total=len(task.questions))
        result = run(
            task, answerer, batch_size=batch, out=out, progress=lambda count: bar.advance(row, count)
        )
    click.echo(json.dumps(asdict(result), default=str) if as_json else markdown([result]))


def is_endpoint(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _endpoint(url: str, served: str, pictures: bool) -> Answerer:
    """The endpoint of these options. Raises `UsageError` for one that it cannot obey."""
    from click.core import ParameterSource

    from tuna_model.evaluation.chat_endpoint import ChatEndpoint
    from tuna_model.evaluation.endpoint_answerer import EndpointAnswerer

    context = click.get_current_context()
    for name in ("store", "any_store", "device", "dtype"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(
                f"{option} is for a model that is loaded here, and {url} is served: "
                "give the store to its server, or to `tuna proxy` in front of it"
            )
    endpoint = ChatEndpoint(url, served)
    if context.get_parameter_source("timeout") is not ParameterSource.DEFAULT:
        endpoint.timeout = context.params["timeout"]
    if not served:
        names = endpoint.served()
        if len(names) != 1:
            raise click.UsageError(f"{url} serves {', '.join(names) or 'no model'}: choose by --served-model")
        endpoint.model = names[0]
    return EndpointAnswerer(endpoint, pictures=pictures)


@click.command()
@with_task
@with_model
@click.option(
    "--rate", default=0.5, show_default=True, help="Share of tags that are exchanged in `corrupted`."
)
def audit(
    model: str, store: str, batch: int, out: Path | None, as_json: bool, rate: float, **options: Any
) -> None:
    """Score the answers to TASK with matched, corrupted, irrelevant, random and no tags.

    Also measure how often the model follows a single wrong tag.
    """
    from rich.progress import Progress

    if is_endpoint(model):
        raise click.UsageError("an audit gives the model other tags, so it needs one that is loaded here")

    from tuna_model.evaluation.answerer import PipelineAnswerer
    from tuna_model.evaluation.audit import audit as run
    from tuna_model.evaluation.audit import plot
    from tuna_model.evaluation.run import write_atomically

    seed = options["seed"]
    task = _load_task(options)
    tuna = load(model, store, **options)
    answerer = PipelineAnswerer(tuna, name=model, store=store)
    with Progress(transient=True) as bar:
        row = bar.add_task("asking", total=None)
        report = run(
            task, answerer, tuna.source, rate=rate, seed=seed, batch_size=batch,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )  # fmt: skip
    if out:
        path, values = out / f"audit-{task.name}", json.dumps(report.to_dict(), indent=1, default=str)
        write_atomically(path.with_suffix(".json"), values + "\n")
        write_atomically(path.with_suffix(".md"), report.markdown())
        plot(report, path.with_suffix(".svg"))
    click.echo(json.dumps(report.to_dict(), default=str) if as_json else report.markdown())


def _load_task(options: dict[str, Any], **more: Any) -> Task:
    """Load the task; takes its own options out of `options`."""
    from dataclasses import fields, replace

    from tuna_model.evaluation import TaskOptions, load_task

    name, length = options.pop("task"), options.pop("max_tokens")
    values = {field.name: options.pop(field.name) for field in fields(TaskOptions) if field.name in options}
    task = load_task(name, TaskOptions(**values, **more))
    return replace(task, max_new_tokens=length) if length else task
