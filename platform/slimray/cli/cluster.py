"""`slimray submit`, `status`, `logs`, `stop` and `slimray cluster ...`: the same jobs, on a cluster.

`submit` returns once the job has been accepted; `submit -f` and `logs -f` return when it has ended, with the exit code
that `slimray run` would have had.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from slimray.cli.terminal import clean_log, out

app = typer.Typer()
local = typer.Typer(no_args_is_help=True, help="Start and stop several Ray nodes on this machine; list cluster files.")
app.add_typer(local, name="cluster")

Files = Annotated[list[str], typer.Argument(help="Job files, as for `run`.", metavar="FILE...")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a field, as for `run`.")]
ClusterName = Annotated[
    str,
    typer.Option("--cluster", help="A cluster file, or its name. Default $SLIMRAY_CLUSTER.", envvar="SLIMRAY_CLUSTER"),
]
JobId = Annotated[str, typer.Argument(help="A job's name (its newest attempt) or id.", metavar="JOB")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@app.command()
def submit(
    files: Files,
    name: ClusterName,
    set_: Sets = None,
    storage: Annotated[
        str | None, typer.Option(help="Where runs are: s3://, gs://, a shared folder. Default: the cluster file's.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Clear the runs of these names first.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the log and stay until the job has ended.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be applied, and apply nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --dry-run: the file to write.", dir_okay=False)] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Do not check data and runs that only the cluster can read.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit the jobs of FILES to a cluster; submitted again, they resume. `--dry-run` prints the complete manifest."""
    from slimray.cluster import submit

    target = submit.load_cluster(name, files[0])
    ready = submit.make_submission(files, target, set_ or [], storage, restart, unchecked)
    if dry_run:
        text = submit.render(ready, target)
        if out is None:
            sys.stdout.write(text)
            return
        out.write_text(text)
        _say(f"next: {submit.how_to_apply(target, shlex.quote(str(out)))}")
        return
    job_id = submit.submit(ready, files, target, set_ or [])
    if as_json:
        _say(json.dumps({"id": job_id, "cluster": target.name, "storage": ready.storage}))
    else:
        _say(f"{job_id}: submitted to {target.name}, its runs are in {ready.storage}")
    if follow:
        _follow(job_id, target, quiet=as_json)
    elif not as_json:
        _say(f"next: slimray logs -f {job_id} --cluster {name}")


@app.command()
def status(
    name: ClusterName,
    job_id: Annotated[str | None, typer.Argument(help="A job's name or id. Default: all.", metavar="[JOB]")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the jobs of a cluster: id, status, age, what they wait for or how they ended; for one JOB also its cost."""
    from slimray.cluster import jobs_api, submit

    target = submit.load_cluster(name)
    found = jobs_api.jobs(target) if job_id is None else [jobs_api.job_info(job_id, target)]
    rows = [_row(one) for one in found]
    if job_id is not None:
        rows[0] |= _run_of(rows[0], target)
    if as_json:
        _say(json.dumps(rows, indent=2))
    elif rows:
        _print(rows)
    else:
        _say(f"no jobs on {target.name}")


def _row(info: dict[str, Any]) -> dict[str, Any]:
    begun, ended = info.get("start_time"), info.get("end_time")
    seconds = None if begun is None else round((ended or time.time() * 1000) / 1000 - begun / 1000)
    lines = (info.get("message") or "").strip().splitlines()
    return {
        "id": info["submission_id"],
        "status": info["status"].lower(),
        "seconds": seconds,
        "storage": (info.get("metadata") or {}).get("storage"),
        "message": lines[-1] if lines else "",
    }


def _run_of(row: dict[str, Any], target: Any) -> dict[str, Any]:
    """Return the name of a job's run, what the run waits for, and what it has cost so far."""
    from slimray import runs
    from slimray.cli.look import spent
    from slimray.cluster.jobs_api import submission_id
    from slimray.cluster.submit import worker_hour
    from slimray.spec import RunFailed, UserError

    where, message = row["storage"] or target.cluster.storage, row["message"]
    if where is None:
        return {}
    slug = row["id"].rpartition("-")[0]
    try:
        run = runs.open_run(where, slug)
        if (status := runs.read_status(run)) is None:  # not started, or its name is not a valid id
            mine = [one for one in runs.list_runs(where) if submission_id(one.name, 0).rpartition("-")[0] == slug]
            if not mine:
                elsewhere = "" if "://" in where else ", or the cluster has another folder of that name"
                return {"run": f"none in {where} yet{elsewhere}"}
            run, status = mine[0], runs.read_status(mine[0])
    except (UserError, RunFailed) as error:
        return {"run": f"cannot be read from here ({error})"}
    waits = status.message if status is not None and status.state == "running" and status.message else message
    return {"run": run.name, "message": waits} | spent(run, worker_hour(target))


@app.command()
def logs(
    job_id: JobId,
    name: ClusterName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")] = False,
) -> None:
    """Print the log of a job; -f follows it until the job ends, and exits with the job's exit code."""
    from slimray.cluster import jobs_api, submit

    target = submit.load_cluster(name)
    if follow:
        _follow(job_id, target)
    else:
        sys.stdout.write(clean_log(jobs_api.log(job_id, target)))


def _follow(job_id: str, target: Any, quiet: bool = False) -> None:
    """Copy the log of a job to standard output; raise the error that the job ended with. Ctrl-C leaves it running."""
    from slimray.cluster import jobs_api
    from slimray.spec import RunFailed

    try:
        for text in jobs_api.follow(job_id, target):
            (sys.stderr if quiet else sys.stdout).write(clean_log(text))
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise RunFailed(
            f"{job_id}: is still running (`slimray logs -f {job_id} --cluster {target.name}` follows it again, "
            "`slimray stop` ends it)"
        ) from None
    jobs_api.require_success(jobs_api.job_info(job_id, target), target)


@app.command()
def stop(job_id: JobId, name: ClusterName) -> None:
    """Stop a job; submitted again, it resumes. It saves first; on Slurm a second `stop` ends it at once."""
    from slimray.cluster import jobs_api, submit

    target = submit.load_cluster(name)
    stopped = jobs_api.stop(job_id, target)
    _say(f"{job_id}: {'is being stopped' if stopped else 'had already ended'}")


@app.command("watch-preemption")
def watch_preemption(
    cloud: Annotated[
        str | None, typer.Option(help="aws, gcp or azure. Default: the one whose metadata service answers here.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray's head, HOST:PORT. Default: that of this machine.")] = None,
    node_id: Annotated[str, typer.Option(help="The Ray node of this machine. Default: found by its IP address.")] = "",
    metadata_url: Annotated[str, typer.Option(help="URL of the metadata service. Default: that of the cloud.")] = "",
) -> None:
    """Watch for a preemption notice for this machine, then drain its Ray node; one agent runs on each node.

    The cluster files start it. It exits once it has drained the node, and at once where no metadata service answers.
    """
    from slimray.cluster import preemption
    from slimray.spec import lookup

    if cloud is not None:
        lookup(preemption.CLOUDS, cloud, "--cloud")
    found = preemption.find_service(cloud, metadata_url)
    if found is None:
        _say(f"no metadata service of {', '.join(preemption.CLOUDS)} answers here, so no preemptions are announced")
        return
    service, me = found
    _say(f"watching {service.url} for notices to {me}")
    preemption.watch(service, me, lambda: preemption.head_of(address or ""), node_id, _say)


# ------------------------------------------------------------------------------------------------ cluster files

Name = Annotated[str, typer.Argument(help="A cluster file of kind local, or its name.", metavar="NAME")]


@local.command()
def start(name: Name = "local") -> None:
    """Start a head on this machine; Ray's autoscaler adds nodes when a job needs them and removes idle ones."""
    from slimray.cluster import local, submit

    target = submit.load_cluster(name)
    address = local.start_local(target)
    _say(f"{target.name}: running at {address}")
    _say(f"next: slimray submit jobs/quickstart.yaml --cluster {name}")


@local.command("stop")
def stop_cluster(name: Name = "local") -> None:
    """Stop the head on this machine and all its nodes."""
    from slimray.cluster import local, submit

    target = submit.load_cluster(name)
    _say(f"{target.name}: {'stopped' if local.stop_local(target) else 'is not running'}")


@local.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the cluster files that can be given by name, with the CPUs and GPUs that each can have at most."""
    from slimray.cluster import specs, submit

    rows = []
    for name in submit.list_clusters():
        target = submit.load_cluster(name)
        have = specs.capacity(target.cluster)
        room = {"cpus": None, "gpus": None} if have is None else {"cpus": have.cpus, "gpus": have.gpus}
        rows.append({"name": name, "kind": target.cluster.kind, **room, "file": target.where})
    if as_json:
        _say(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _print(rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    table = Table()
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*["" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()])
    out.print(table)
