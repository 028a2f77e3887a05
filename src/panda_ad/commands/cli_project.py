# SPDX-License-Identifier: Apache-2.0
"""Commands on the whole project: run, summary, ui, serve.

Options and words; what they do is imported when they run, so that the help is there at once.
"""

from __future__ import annotations

from typing import Annotated

import typer


def run() -> None:
    """Bring data, pipeline and promotion up to date.

    Pulls the data if missing, runs the stages that have changed, asks the gate, and says where to look.
    """
    from panda_ad.commands.run import run

    run()


def summary() -> None:
    """Show the figures of the last run.

    Metrics, threshold, time and memory per stage, versions, what the gate decided.
    """
    from panda_ad.commands.summary import summary

    print(summary())


def ui(
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="MLflow's port on 127.0.0.1.")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Prefect's port on 127.0.0.1.")] = 4200,
    inspect_port: Annotated[int, typer.Option(min=1, max=65535, help="The page's port on 127.0.0.1.")] = 5002,
) -> None:
    """Start MLflow, Prefect and the inspector's page.

    On 127.0.0.1, with the deployments of prefect.yaml and a worker that runs them.
    """
    from panda_ad.commands.servers import serve_ui
    from panda_ad.params_file import load_params

    load_params()  # a wrong folder, or a mistake in params.yaml, is better said now than by a flow
    serve_ui(mlflow_port, prefect_port, inspect_port)


def serve(
    model: Annotated[str, typer.Argument(help="A registered model, e.g. models:/panda-sample-fabric@staging.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.")] = 5001,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than loopback answers whoever reaches it.")
    ] = "127.0.0.1",
) -> None:
    """Serve a registered model over REST, until Ctrl-C.

    MLflow's request format; answers base64 images with score, p-value, threshold and decision.
    """
    from panda_ad.registry.serve import serve

    serve(model, port, host)
