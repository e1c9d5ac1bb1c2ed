"""`slimray live`, `slimray agent`: the commands that run on edge devices. They need neither torch nor Ray."""

from pathlib import Path
from typing import Annotated

import typer

from slimray.cli.terminal import Storage, say, storage_of

app = typer.Typer()


@app.command()
def agent(
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is reached through an SSH tunnel.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = 8060,
    max_mb: Annotated[int, typer.Option(help="Largest network, in MB.", min=1, max=2047)] = 512,
    total_mb: Annotated[int, typer.Option(help="Disk space for all networks together, in MB.", min=1)] = 4096,
    max_seconds: Annotated[float, typer.Option(help="Time after which a measurement is stopped.", min=1)] = 120.0,
) -> None:
    """Time networks that `slimray profile --device` sends here, until Ctrl-C. Executes nothing else.

    The token that clients must send is printed once, or is that of SLIMRAY_AGENT_TOKEN. The agent uses plain HTTP:
    leave it at 127.0.0.1 and run `ssh -L 8060:127.0.0.1:8060 DEVICE` on the machine that profiles.
    """
    from slimray.runtime.agent import Limits, serve

    serve(host, port, Limits(max_mb, total_mb, max_seconds), lambda text: print(text, flush=True))  # shows the token


@app.command()
def live(
    export: Annotated[
        str, typer.Argument(help="An export, or a run that has one: folder, name or URI.", metavar="EXPORT")
    ],
    file: Annotated[Path | None, typer.Argument(help="A video in place of a camera.", metavar="[VIDEO]")] = None,
    camera: Annotated[int | None, typer.Option(help="Number of the camera.", min=0)] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Restart the video at its end.")] = False,
    smooth: Annotated[int, typer.Option(help="Number of frames whose probabilities are averaged.", min=1)] = 12,
    threads: Annotated[int | None, typer.Option(help="Threads of the network.", min=1)] = None,
    port: Annotated[int, typer.Option(help="Port of the page; 0 picks a free one.", min=0, max=65535)] = 8051,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    storage: Storage = None,
) -> None:
    """Label what a camera sees, frame by frame, on a page at 127.0.0.1, until Ctrl-C or the end of the video.

    Online networks are stepped, others see the last frames. Frames that arrive faster than they can be labelled are
    dropped and counted, so that the delay does not grow.
    """
    from slimray.runtime.live import open_live
    from slimray.runtime.live_page import serve
    from slimray.runtime.loaded import load

    net = load(export, storage=storage_of(storage), threads=threads)
    run = open_live(net, camera, file, loop, smooth)
    serve(run, f"{export} on {file if file is not None else f'camera {camera}'}", port, open_, say)
