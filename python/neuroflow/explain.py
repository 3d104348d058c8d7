"""What NeuroFlow finds in a model, as text."""

from torch import nn

from .adapters import Anatomy, Family, describe, towers


def explain(model: nn.Module) -> str:
    """Describe the vision towers that NeuroFlow finds in a model, their parts, and the architectures they can run.

    If a tower cannot be patched, the text says why. If its parts were identified wrongly, correct them with
    `register_adapter` and a function that returns `dataclasses.replace(neuroflow.adapters.general(tower), ...)`.

    Args:
        model: a model, patched or not.

    Returns:
        a few lines of text for each tower.

    Raises:
        TypeError: `model` is not a module, or nothing in it looks like a vision tower.

    Example:
        >>> print(neuroflow.explain(model).splitlines()[0])
        the model itself: SiglipVisionModel, known as SigLIP
    """
    lines = []
    for name, (tower, family) in towers(model).items():
        found_by = f"known as {family.name}" if isinstance(family.found_by, tuple) else "found by its structure"
        lines.append(f"{name or 'the model itself'}: {type(tower).__name__}, {found_by}")
        try:
            anatomy = describe(model, name)
        except (TypeError, ValueError) as error:
            lines.append(f"  cannot be patched: {error}")
        else:
            lines += [f"  {part}: {what}" for part, what in _parts(anatomy, family).items()]
    return "\n".join(lines)


def _parts(anatomy: Anatomy, family: Family) -> dict[str, str]:
    names = {module: name or "the tower itself" for name, module in anatomy.tower.named_modules()}
    block, attention = anatomy.layers[0], anatomy.attentions[0]
    inside = {module: name for name, module in block.named_modules()}
    projection = anatomy.projection
    parts = {
        "patches": "the tokens in front of the first block"
        if projection is None
        else f"{type(projection).__name__} {names[projection]}"
        + (f" of {' x '.join(map(str, projection.kernel_size))}" if hasattr(projection, "kernel_size") else ""),
        "blocks": f"{len(anatomy.layers)} {type(block).__name__}, {names[block]} to {names[anatomy.layers[-1]]}",
        "attention": f"{type(attention).__name__} {inside.get(attention, names[attention])}, "
        + ("by transformers' interface" if anatomy.attention is None else "by a replacement for its own"),
        "MLP": " to ".join(dict.fromkeys(inside.get(part, names[part]) for part in anatomy.mlps[0]))
        if anatomy.mlps
        else "none that could be identified",
        "per token, in the blocks": ", ".join(name for name, _ in anatomy.positions) or "nothing",
        "tokens before the patches": str(anatomy.prefix),
        "all tokens are back after": names[anatomy.last],
        "pooled output": "the model's own, from all tokens" if anatomy.pool is None else names[anatomy.pool[0]],
    }
    letters = [letter for letter in family.architectures if letter != "A" or anatomy.mlps]
    return parts | {"architectures": ", ".join(letters)}
