"""Subcommands that live in other rooms, found as entry points and imported only when they run.

The groups are "kvstrata.commands" and "kvctl.commands"; an entry's name is the subcommand, its
value ("module:attribute") a function that typer can read or a ``typer.Typer``. Listing them, as
``kvstrata --help`` does, imports none of them.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand

from kvstrata.client.terminal import ErrorReportingGroup
from kvstrata.protos.errors import InternalError

GROUP = "kvstrata.commands"
ADMIN_GROUP = "kvctl.commands"
# Known here so that help needs no import of the rooms that do the work.
HELP = {
    "bench": "Measure Put, Get and Lookup of a running store.",
    "calibrate": "Fit a model's compression profile.",
    "demo": "Show the cache at work, on this machine.",
    "gateway": "Serve the gateway alone.",
    "store": "Serve the block store alone.",
    "tune": "Train what a method needs, for one model.",
    "up": "Start the whole service on this machine.",
}


class LazyCommand(TyperCommand):
    """Stands for an entry point; becomes the real command once its arguments are parsed."""

    def __init__(self, entry: EntryPoint) -> None:
        self._entry = entry
        text = HELP.get(entry.name, f"Provided by {entry.value.partition(':')[0]}.")
        super().__init__(entry.name, help=text, short_help=text)

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Return the real command's context."""
        return self.load().make_context(info_name, args, parent=parent, **extra)

    def load(self) -> Any:
        """Return the real command.

        Raises:
            InternalError: Its module cannot be imported or has no such attribute.
        """
        try:
            target: Any = self._entry.load()
        except (ImportError, AttributeError) as error:
            raise InternalError(
                f"the command {self.name!r} cannot be loaded: {error}",
                "install kvstrata with all its dependencies",
            ) from error
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False)
            app.command(self.name)(target)
            target = app
        return typer.main.get_command(target)


class PluginGroup(ErrorReportingGroup):
    """A command group that continues in the entry points; its own commands win."""

    entries = GROUP

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *sorted(set(entry_points(group=self.entries).names) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, unloaded where it lives elsewhere, or None."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            for entry in entry_points(group=self.entries, name=cmd_name):
                return LazyCommand(entry)
        return command


class AdminPluginGroup(PluginGroup):
    """The same for ``kvctl``."""

    entries = ADMIN_GROUP
