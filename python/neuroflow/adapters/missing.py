"""What an adapter for an unknown model would have to point at, as far as the model's structure shows."""

from torch import nn

from .anatomy import is_patch_projection


def missing_parts(model: nn.Module) -> str:
    """Which parts of a vision tower `model` seems to have, and which it lacks."""
    modules = list(model.named_modules())
    projections = [name for name, module in modules if is_patch_projection(module)]
    blocks = [
        name
        for name, module in modules
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and any("attention" in type(part).__name__.lower() for part in module[0].modules())
    ]
    attentions = [
        f"{blocks[0]}.0.{name}"
        for name, part in (model.get_submodule(blocks[0])[0].named_modules() if blocks else [])
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    ]
    parts = {
        "a convolution over patches": projections,
        "a list of blocks with attention": blocks,
        "attention that calls transformers' attention interface": attentions,
        "a norm": [name for name, module in modules if type(module).__name__.endswith("Norm")][-1:],
    }
    found = [f"{part} ({names[0] or 'the model itself'})" for part, names in parts.items() if names]
    missing = [part for part, names in parts.items() if not names]
    return f"Parts of an adapter found: {', '.join(found) or 'nothing'}; missing: {', '.join(missing) or 'nothing'}."
