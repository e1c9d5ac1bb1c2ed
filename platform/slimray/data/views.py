"""The views in which samples are scored: turns the plain recipe of a validation into that of an evaluation.

There is one function per modality. `options` are the fields of an evaluation: `clips`, `crops`, `size`, `votes`, and
those that belong to them.
"""

from collections.abc import Mapping
from typing import Any

from slimray.data.spec import scaled_resize


def at_size(recipe: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a plain recipe of square pictures with another side `size`, in pixels, and the same zoom.

    The crop keeps its share of the short side: `resize` is scaled with `size`, and 0, the automatic value, stays 0.
    """
    resize = recipe["resize"]
    return {**recipe, "size": size, "resize": resize and scaled_resize(resize, recipe["size"], size)}


def _sized(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe with the crop size and the short side of the options, if they are set."""
    sized = at_size(recipe, options["size"]) if options["size"] else recipe
    return sized | {"resize": max(options["resize"], sized["size"])} if options["resize"] else sized


def clip_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with clips x crops of each video (arXiv 1811.08383), in the given size and order of frames."""
    plain = options["clips"] == 1 and options["crops"] == 1
    recipe = recipe | {"mode": "val" if plain else "test", "num_clips": options["clips"], "crops": options["crops"]}
    return _sized(recipe, options) | {"frame_order": options["frame_order"], "flip": False}


def clip_views_fit(recipe: Mapping[str, Any], options: Mapping[str, Any], run: str) -> str:
    """Return why the number of clips does not match the frame sampling of `run`, "" if it does."""
    sampling = recipe.get("sampling", "uniform")
    wanted = {2: "uniform", 10: "dense"}.get(options["clips"], sampling)
    if sampling == wanted:
        return ""
    return f"clips: {options['clips']} is for {wanted} sampling, but {run!r} was trained with {sampling}"


def image_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with crops of each picture, in the given size."""
    return _sized(recipe, options) | {"mode": "test", "crops": options["crops"], "flip": False}


def point_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with views of each cloud in which every point occurs at least as often as there are votes.

    `options["num_points"]` is the size of the largest cloud. With `fill` (windows) all clouds get the same number of
    views, otherwise (shapes) it depends on their points.
    """
    if not options["votes"]:
        return recipe
    own = {"mode": "test", "votes": options["votes"], "max_points": options["num_points"], "fill": options["fill"]}
    return recipe | own


def text_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with every text once, and windows as they were cut."""
    return recipe | {"mode": "test"}


def same_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a validation unchanged."""
    return recipe


def all_fit(recipe: Mapping[str, Any], options: Mapping[str, Any], run: str) -> str:
    """Return "": any options match."""
    return ""
