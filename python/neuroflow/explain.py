"""What NeuroFlow finds in a model, in words."""

from torch import nn

from .adapters import Anatomy, Family, describe, towers


def explain(model: nn.Module) -> str:
    """Where the vision towers of a model are, what they are made of as NeuroFlow sees it, and what they can run.

    For a tower that cannot be patched it says why. One that was not understood rightly can be corrected:
    `register_adapter` takes a function that gives `dataclasses.replace(neuroflow.adapters.general(tower), ...)`.

    Returns:
        some lines of text.

    Raises:
        TypeError: `model` is no module, or nothing in it looks like a vision tower.

    Example:
        print(neuroflow.explain(model))
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
        "patches": "of the tokens in front of the first block"
        if projection is None
        else f"{type(projection).__name__} {names[projection]}"
        + (f" of {' x '.join(map(str, projection.kernel_size))}" if hasattr(projection, "kernel_size") else ""),
        "blocks": f"{len(anatomy.layers)} {type(block).__name__}, {names[block]} to {names[anatomy.layers[-1]]}",
        "attention": f"{type(attention).__name__} {inside.get(attention, names[attention])}, "
        + ("by transformers' interface" if anatomy.attention is None else "by what stands in for its own"),
        "MLP": " to ".join(dict.fromkeys(inside.get(part, names[part]) for part in anatomy.mlps[0]))
        if anatomy.mlps
        else "none that could be told from the rest",
        "of each token, in the blocks": ", ".join(name for name, _ in anatomy.positions) or "nothing",
        "tokens before the patches": str(anatomy.prefix),
        "all tokens are back after": names[anatomy.last],
        "pooled output": "of the model's own, of all tokens" if anatomy.pool is None else names[anatomy.pool[0]],
    }
    letters = [letter for letter in family.architectures if letter != "A" or anatomy.mlps]
    return parts | {"architectures": ", ".join(letters)}
