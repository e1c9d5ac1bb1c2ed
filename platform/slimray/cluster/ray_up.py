"""Cloud machines started by `ray up`: validates the cluster file against Ray's own schema."""

from pathlib import Path

from slimray.cluster.specs import RayUpCluster
from slimray.spec import UserError


def require_ray_up(cluster: RayUpCluster, path: Path) -> None:
    """Validate `ray_up` against Ray's own schema; UserError with file and field if it does not fit."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    defaults = {"cluster_synced_files": [], "max_workers": 2}
    try:
        validate_config(defaults | cluster.ray_up)
    except ValidationError as error:
        field = ".".join(["ray_up", *map(str, error.absolute_path)])
        raise UserError(f"{path}: {field}: {error.message}") from None
    except ValueError as error:
        raise UserError(f"{path}: ray_up: {error}") from None
