"""``python -m kvstrata.kvstore_service`` runs a store."""

import typer

from kvstrata.kvstore_service.command import main

typer.run(main)
