"""The views in which samples are scored: the plain recipe of an evaluation out of that of a validation, by modality.

`options` are the fields of an evaluation: `clips`, `crops`, `size`, `votes`, and what goes with them.
"""

from collections.abc import Mapping
from typing import Any

from slimray.data.spec import scaled_resize


def at_size(recipe: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a plain recipe of square pictures at another side `size`, in pixels, with the same zoom.

    The crop keeps its share of the short side: `resize` changes with `size`, and 0 (which follows by itself) stays 0.
    """
    resize = recipe["resize"]
    return {**recipe, "size": size, "resize": resize and scaled_resize(resize, recipe["size"], size)}


def _sized(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the side of the crop and the short side that the options ask for, if they do."""
    sized = at_size(recipe, options["size"]) if options["size"] else recipe
    return sized | {"resize": max(options["resize"], sized["size"])} if options["resize"] else sized


def clip_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Clips x crops of each video (arXiv 1811.08383), at another size, in another order of frames."""
    plain = options["clips"] == 1 and options["crops"] == 1
    recipe = recipe | {"mode": "val" if plain else "test", "num_clips": options["clips"], "crops": options["crops"]}
    return _sized(recipe, options) | {"frame_order": options["frame_order"], "flip": False}


def clip_views_fit(recipe: Mapping[str, Any], options: Mapping[str, Any], run: str) -> str:
    """Say why the number of clips does not fit the sampling of frames of `run`, "" if it does."""
    sampling = recipe.get("sampling", "uniform")
    wanted = {2: "uniform", 10: "dense"}.get(options["clips"], sampling)
    if sampling == wanted:
        return ""
    return f"clips: {options['clips']} is for {wanted} sampling, {run!r} was trained with {sampling}"


def image_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Crops of each picture, at another size."""
    return _sized(recipe, options) | {"mode": "test", "crops": options["crops"], "flip": False}


def point_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Draws of each cloud in which every point comes as often as there are votes.

    `num_points` is that of the largest cloud. Windows (`fill`) are drawn equally often, shapes by their points.
    """
    if not options["votes"]:
        return recipe
    own = {"mode": "test", "votes": options["votes"], "max_points": options["num_points"], "fill": options["fill"]}
    return recipe | own


def text_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Every text once, windows as they were cut."""
    return recipe | {"mode": "test"}


def same_views(recipe: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The views of a validation."""
    return recipe


def all_fit(recipe: Mapping[str, Any], options: Mapping[str, Any], run: str) -> str:
    """Nothing to object."""
    return ""
