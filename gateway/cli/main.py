"""The `smelt` command. Sub-commands are loaded when they are called: help costs neither gRPC nor telemetry."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class _Entry(NamedTuple):
    module: str
    help: str


_COMMANDS = {
    "up": _Entry("stack", "Start the platform on this machine."),
    "down": _Entry("stack", "Stop it."),
    "status": _Entry("stack", "Show what runs, and where."),
    "doctor": _Entry("stack", "Check that this machine has what the platform needs."),
    "logs": _Entry("stack", "Show the last lines that a process of the platform logged."),
    "import": _Entry("models", "Import a model from a folder, a .gguf file or a hub."),
    "models": _Entry("models", "List the models in the catalogue."),
    "inspect": _Entry("models", "Show architecture, contract, lineage and tensors of a model."),
    "check": _Entry("models", "Load a stored model in a clean process and probe it."),
    "quantize": _Entry("models", "Make a smaller model."),
    "run": _Entry("generate", "Generate once, streaming."),
    "chat": _Entry("generate", "Talk to a model."),
    "train": _Entry("train", "Plan, run and follow a training."),
    "runs": _Entry("runs", "List, show and compare finished trainings."),
    "gpus": _Entry("monitor", "Show the GPUs, who holds them and who waits."),
    "eval": _Entry("evaluate", "Score a model on a suite."),
    "judge": _Entry("evaluate", "Score completions that are stored in a file."),
    "suites": _Entry("evaluate", "List the benchmark suites."),
    "references": _Entry("evaluate", "Check that a suite's reference solutions pass."),
    "report": _Entry("reports", "Show a report."),
    "results": _Entry("reports", "List finished evaluations."),
    "compare": _Entry("reports", "Compare two reports of one suite, problem by problem."),
    "gate": _Entry("reports", "Check conditions on reports of one model."),
    "monitor": _Entry("monitor", "Show live what runs, how it goes, and the GPUs."),
    "recipe": _Entry("recipe", "Plan, run and show several stages, each one of these commands, from one file."),
    "jobs": _Entry("jobs", "List, follow, cancel and trace jobs."),
    "sandbox": _Entry("sandbox", "Run a program in the sandbox, or see how it isolates."),
    "gc": _Entry("gc", "Show, or delete, what in the store nothing leads to."),
    "admin": _Entry("admin", "Back the platform up, restore it, make certificates."),
    "config": _Entry("settings", "Show where each setting comes from."),
}


class _LazyGroup(TyperGroup):
    """Knows its commands by name and help; loads the module of one only to call it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command that has its help only."""
        entry = _COMMANDS.get(cmd_name)
        return None if entry is None else TyperCommand(cmd_name, help=entry.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command, loaded."""
        self.commands = {name: TyperCommand(name) for name in _COMMANDS}
        name, found, rest = super().resolve_command(ctx, args)
        return name, _load(name) if found is not None and name is not None else found, rest


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def smelt() -> None:
    """Refine code language models: import, quantize, serve, generate, judge and score."""


def main() -> None:
    """Entry point of the `smelt` command."""
    app(prog_name="smelt")


def _load(name: str) -> Any:
    module = importlib.import_module(f"gateway.cli.commands.{_COMMANDS[name].module}")
    loaded: Any = typer.main.get_command(module.app)
    return getattr(loaded, "commands", {}).get(name, loaded)


if __name__ == "__main__":
    main()
