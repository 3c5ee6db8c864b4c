"""The command line. A user's mistake gets one message and no traceback.

Exit codes: 0 done, 2 bad usage or configuration, 3 the cluster cannot hold the plan, 4 stopped by a signal with a valid
last commit, 1 anything else.

Heavy libraries are imported by the command that needs them, so that `attune --help` and the client stay light.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from services.errors import Deadline, PlanError, UserError

app = typer.Typer(
    name="attune",
    help="Aligns language models by reinforcement learning from the policy's own attention, reward models and judges.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="KEY=VALUE, for example learner.lr=2e-5.", show_default=False)
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file, as JSON.")]

EXIT_STOPPED = 4
TYPERS_INTERRUPT = 130


def _console() -> Console:
    return Console(stderr=False)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/NAME of the recipe's file.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto | never | path of a committed checkpoint of this run.")] = "auto",
) -> None:
    """Trains a policy by a recipe, through the whole service."""
    from cluster.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    from cluster.driver import train as run_training  # takes seconds: a mistake in the recipe is told before

    directory = run_dir or Path("runs") / recipe.stem
    console = _console()
    outcome = run_training(config, directory, resume=resume, console=console)
    if outcome.stopped:
        console.print(
            f"Stopped by {outcome.stopped} after {outcome.steps} steps; the last commit holds "
            f"{outcome.committed_steps}. Go on with: attune train {recipe} --run-dir {directory} --resume auto",
            highlight=False,
        )
        raise typer.Exit(EXIT_STOPPED if outcome.has_commit else 1)
    console.print(
        f"Done: {outcome.steps} steps in {outcome.seconds:.0f} s. The policy is in {directory / 'policy'}",
        highlight=False,
    )


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); without one: what this machine can train.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run directory whose disk is looked at; by default runs/NAME.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Whether a recipe fits the cluster, or this machine: memory, GPUs, disk, Redis, versions, and a plan.

    Exit code 3 where something does not fit, with the bytes that are missing; 1 where something else is broken.
    """
    from cluster.recipe import load_recipe, resolve

    config = None if recipe is None else load_recipe(recipe, overrides or [])
    from cluster.doctor_report import plain, print_report

    if config is not None and recipe is not None:
        from cluster.doctor import examine

        report = examine(config, run_dir or Path("runs") / recipe.stem)
    else:
        from cluster.machine import look_here
        from cluster.sizes import examine_machine, ladder_tree

        machine = look_here()
        report = examine_machine(resolve(ladder_tree(machine), "attune doctor"), machine)
    print_report(report, _console())
    if json_file is not None:
        json_file.write_text(json.dumps(plain(report), indent=2), encoding="utf-8")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


@app.command()
def quickstart(
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where everything is written; by default runs/quickstart, or runs/quickstart-encoder-decoder.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="RL steps; by default the recipe's.")] = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None,
        typer.Option(help="What generates; by default vllm for a decoder, transformers for an encoder-decoder."),
    ] = None,
    family: Annotated[
        Literal["decoder", "encoder-decoder"], typer.Option(help="Architecture of the policy: Llama or T5.")
    ] = "decoder",
) -> None:
    """Builds a small policy from generated questions, fine-tunes it, trains it by its attention, evaluates it."""
    from cluster.quickstart import quickstart as run_quickstart

    directory = run_dir or Path("runs/quickstart" if family == "decoder" else f"runs/quickstart-{family}")
    chosen = engine or ("vllm" if family == "decoder" else "transformers")
    code = run_quickstart(directory, steps=steps, engine=chosen, family=family, console=_console())
    raise typer.Exit(code)


@app.command()
def sft(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Where the fine-tuned model is written.")],
    overrides: Overrides = None,
) -> None:
    """Fine-tunes the policy on the reference responses: cross-entropy on response tokens only."""
    from cluster.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    from cluster.fine_tuning import fine_tune

    console = _console()
    result = fine_tune(config, out, console=console)
    console.print(f"Done: validation loss {result.validation_loss:.4f}. The model is in {out}", highlight=False)


@app.command(name="reward-model")
def reward_model(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Where the model that scores is written.")],
    overrides: Overrides = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto goes on where a training of --out was ended; never begins anew."),
    ] = "auto",
) -> None:
    """Trains a model that scores, from the policy, on comparisons, ratings or labels of steps."""
    from cluster.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    from cluster.reward_model import figures_line, train_reward_model

    console = _console()
    report = train_reward_model(config, out, console=console, resume=resume)
    console.print(f"Done: {figures_line(report)}. The model is in {out}", highlight=False)


@app.command()
def preferences(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Comparisons, a JSON object a line; must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Makes synthetic comparisons: off-topic negatives, or a judge's preferences by principles."""
    from cluster.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    from cluster.preferences import write_preferences

    console = _console()
    written = write_preferences(config, out, console=console)
    said = f"Done: {written.comparisons} comparisons in {out}"
    if written.consistent is not None:
        said += f"; the judge agrees with itself in both orders on {written.consistent:.1%}, {written.failed} undecided"
    console.print(said, highlight=False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A committed checkpoint: RUN/checkpoints/step_N.")],
    directory: Annotated[Path, typer.Argument(help="Where the model directory is written; must not exist.")],
) -> None:
    """Writes a committed checkpoint as a model directory: safetensors, configuration, tokenizer."""
    from cluster.export import export_checkpoint

    export_checkpoint(checkpoint, directory)
    _console().print(f"The model is in {directory}", highlight=False)


@app.command()
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="Model directory in place of the recipe's policy.model.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Model to compare with, prompt by prompt.")] = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Held-out prompts to answer.")] = "test",
    json_file: Json = None,
) -> None:
    """Metrics of a model on held-out prompts, with intervals; with a baseline, the paired comparison."""
    from cluster.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    from cluster.evaluation_command import evaluate_models

    figures = evaluate_models(config, model=model, baseline=baseline, split=split, console=_console())
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2), encoding="utf-8")


@app.command()
def rollout(
    model: Annotated[str, typer.Option(help="Model directory or hub name.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: JSONL or Parquet, as a recipe's data.source.")],
    out: Annotated[
        Path, typer.Option(help="Samples, a JSON object a line; what stands there already is gone on with.")
    ],
    engine: Annotated[Literal["vllm", "transformers"], typer.Option(help="What generates.")] = "vllm",
    samples: Annotated[int, typer.Option(min=1, help="Samples of a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Softmax temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    capture_layers: Annotated[int, typer.Option(min=1, help="Last decoder layers that are captured.")] = 1,
    content: Annotated[
        Literal["all", "user", "all_user"],
        typer.Option(help="Positions of the prompt that count, as salience.content."),
    ] = "all",
    keep_maps: Annotated[
        bool, typer.Option("--keep-maps", help="Keep the dense attention rows, in OUT.maps/.")
    ] = False,
) -> None:
    """Samples with attention statistics, offline: no learner, no reward, no Ray."""
    from cluster.offline import OfflineRollout, roll_out

    asked = OfflineRollout(
        model=model,
        prompts=prompts,
        out=out,
        engine=engine,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        capture_layers=capture_layers,
        content=content,
        keep_maps=keep_maps,
    )
    console = _console()
    written = roll_out(asked, console=console)
    console.print(f"Done: {written} samples in {out}", highlight=False)


@app.command(name="reward-server")
def reward_server(
    recipe: Recipe,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8077,
) -> None:
    """The scoring service alone, without Ray."""
    from cluster.recipe import load_reward_section
    from reward_server.serve import run

    run(load_reward_section(recipe, overrides or []), host=host, port=port)


@app.command(name="reward-key")
def reward_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs and refusals name it.", show_default=False)],
    file: Annotated[Path, typer.Option(help="Keys file to append to: reward.keys_file of the server's recipe.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests a minute.")] = None,
    max_items: Annotated[int | None, typer.Option(min=1, help="Most items under way at a time.")] = None,
    interventions: Annotated[bool, typer.Option("--interventions", help="It may also add interventions.")] = False,
) -> None:
    """Makes an API key of the reward server: prints it, once, and appends its hash to a file."""
    from reward_server.keys import Role, make_key

    role: Role = "interventions" if interventions else "score"
    typer.echo(make_key(file, name, role=role, requests_per_minute=requests_per_minute, max_items=max_items))


@app.command()
def rewardbench(
    pairs: Annotated[Path, typer.Argument(help="JSONL: prompt, chosen, rejected, subset.", show_default=False)],
    url: Annotated[str, typer.Option(help="The reward server.")] = "http://127.0.0.1:8077",
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "ATTUNE_REWARD_TOKEN",
    source: Annotated[list[str] | None, typer.Option(help="A source to ask; all by default. Repeatable.")] = None,
    json_file: Json = None,
) -> None:
    """How often a reward server prefers the chosen response to the rejected one, by subset."""
    from reward_server.rewardbench import run_pairs, table

    figures = run_pairs(pairs, url, os.environ.get(key_env), sources=source)
    _console().print(table(figures), highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(figures.plain(), indent=2), encoding="utf-8")


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="Run directory, of a live run or a dead one.", show_default=False)],
    uncommitted: Annotated[
        bool, typer.Option("--uncommitted", help="Name every prompt that is not committed, and why.")
    ] = False,
    json_file: Json = None,
) -> None:
    """The account of every prompt of a run: how many are in each state. Reads, and changes nothing."""
    from cluster.ledger_account import account_of
    from cluster.ledger_table import lines_of, print_account

    account = account_of(run, names=uncommitted)
    print_account(account, _console())
    for line in lines_of(account.uncommitted or ()) if uncommitted else ():
        typer.echo(line)
    if json_file is not None:
        json_file.write_text(json.dumps(account.plain(), indent=2), encoding="utf-8")


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="A run directory, or a directory of runs.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to bind; another than loopback needs --expose.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8078,
    expose: Annotated[
        bool, typer.Option("--expose", help="Others may reach it: prompts and responses go over plain HTTP.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that the page is reached under. Repeatable.")
    ] = None,
) -> None:
    """The run page: what runs do now and what they did, from their files alone. Prints an address with a token."""
    from services.dashboard.serve import serve

    serve(runs, host=host, port=port, expose=expose, allowed=allow_host or ())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="File to write; by default RUN-report.html beside the run.")] = None,
) -> None:
    """One HTML file of a run, to send to somebody: curves, tables, pictures of samples. It needs no script."""
    from services.dashboard.report import write_report

    file = out or run.resolve().with_name(f"{run.resolve().name}-report.html")
    size = write_report(run, file)
    _console().print(f"The report is in {file} ({size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="File to write; by default standard output.")] = None) -> None:
    """The JSON schema of recipes, for editors."""
    from cluster.recipe import json_schema

    text = json.dumps(json_schema(), indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


def run_command(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command: Any = typer.main.get_command(app)
    try:
        command.main(args=arguments, prog_name="attune")
    except SystemExit as ended:  # how typer ends a command, also one that was done, and one whose usage it refused
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        return _complain("interrupted", 1) if code == TYPERS_INTERRUPT else code
    except PlanError as error:
        return _complain(error, 3)
    except UserError as error:
        return _complain(error, 2)
    except Deadline as error:
        return _complain(error, 1)
    except Exception as error:
        from cluster.running import PartFailed
        from learner.commit import NoSpace, is_full_disk

        if isinstance(error, PartFailed | NoSpace):
            return _complain(error, 1)
        if is_full_disk(error):
            return _complain(f"the disk is full: {error}", 1)
        raise
    return 0


def _complain(error: object, code: int) -> int:
    sys.stderr.write(f"attune: {error}\n")
    return code


def main() -> None:
    """The `attune` command."""
    sys.exit(run_command())
