"""The verbs: the kinds of jobs, one file each, and the table of them.

Each file has the same four names: `Job`, the fields that a user may write; `check(job, ctx)`, all that can be known
before machines are requested; `makes(job)`, the runs that a job leaves behind, with their contents; `run(job, ctx)`. A
verb imports neither Ray nor torch until it checks or runs, so that reading a file is quick. The other files hold code
that verbs share.
"""

from types import ModuleType

from slimray.verbs import compress, evaluate, export, prepare, proxyless, recalibrate, search, shrink, train

VERBS: dict[str, ModuleType] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "shrink": shrink,
    "search": search,
    "proxyless": proxyless,
    "recalibrate": recalibrate,
    "compress": compress,
    "export": export,
}
