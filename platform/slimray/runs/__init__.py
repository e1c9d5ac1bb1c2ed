"""The run folder, the only contract between verbs."""

from slimray.runs.folder import (
    FILES as FILES,
)
from slimray.runs.folder import (
    FLUSH_ROWS as FLUSH_ROWS,
)
from slimray.runs.folder import (
    FLUSH_S as FLUSH_S,
)
from slimray.runs.folder import (
    FOLDERS as FOLDERS,
)
from slimray.runs.folder import (
    HEARTBEAT_S as HEARTBEAT_S,
)
from slimray.runs.folder import (
    MAX_WAITING_ROWS as MAX_WAITING_ROWS,
)
from slimray.runs.folder import (
    SETTLE_S as SETTLE_S,
)
from slimray.runs.folder import (
    STALE_S as STALE_S,
)
from slimray.runs.folder import (
    Checkpoint as Checkpoint,
)
from slimray.runs.folder import (
    Claim as Claim,
)
from slimray.runs.folder import (
    PartWriter as PartWriter,
)
from slimray.runs.folder import (
    Run as Run,
)
from slimray.runs.folder import (
    State as State,
)
from slimray.runs.folder import (
    Status as Status,
)
from slimray.runs.folder import (
    begin as begin,
)
from slimray.runs.folder import (
    checkpoint_at as checkpoint_at,
)
from slimray.runs.folder import (
    claim as claim,
)
from slimray.runs.folder import (
    clear as clear,
)
from slimray.runs.folder import (
    count_writers as count_writers,
)
from slimray.runs.folder import (
    describe as describe,
)
from slimray.runs.folder import (
    drop_after as drop_after,
)
from slimray.runs.folder import (
    end as end,
)
from slimray.runs.folder import (
    exists as exists,
)
from slimray.runs.folder import (
    find_run as find_run,
)
from slimray.runs.folder import (
    hold as hold,
)
from slimray.runs.folder import (
    keep as keep,
)
from slimray.runs.folder import (
    list_checkpoints as list_checkpoints,
)
from slimray.runs.folder import (
    list_names as list_names,
)
from slimray.runs.folder import (
    list_runs as list_runs,
)
from slimray.runs.folder import (
    log as log,
)
from slimray.runs.folder import (
    newest_checkpoint as newest_checkpoint,
)
from slimray.runs.folder import (
    open_run as open_run,
)
from slimray.runs.folder import (
    read_card as read_card,
)
from slimray.runs.folder import (
    read_checkpoint as read_checkpoint,
)
from slimray.runs.folder import (
    read_file as read_file,
)
from slimray.runs.folder import (
    read_job as read_job,
)
from slimray.runs.folder import (
    read_model as read_model,
)
from slimray.runs.folder import (
    read_parts as read_parts,
)
from slimray.runs.folder import (
    read_status as read_status,
)
from slimray.runs.folder import (
    run_at as run_at,
)
from slimray.runs.folder import (
    save_checkpoint as save_checkpoint,
)
from slimray.runs.folder import (
    sweep_orphans as sweep_orphans,
)
from slimray.runs.folder import (
    weights_source as weights_source,
)
from slimray.runs.folder import (
    write_card as write_card,
)
from slimray.runs.folder import (
    write_file as write_file,
)
from slimray.runs.folder import (
    write_job as write_job,
)
from slimray.runs.folder import (
    write_model as write_model,
)
from slimray.runs.folder import (
    write_report as write_report,
)
