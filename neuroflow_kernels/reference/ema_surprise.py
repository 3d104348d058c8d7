import torch

NORM_FLOOR = 1e-8


def ema_surprise_(h: torch.Tensor, ema: torch.Tensor, decay: float) -> torch.Tensor:
    accumulate = torch.float64 if h.dtype == torch.float64 else torch.float32
    token, reference = h.to(accumulate), ema.to(accumulate)
    square = token.square().sum(-1)
    norms = square.sqrt().clamp_min(NORM_FLOOR) * reference.square().sum(-1).sqrt().clamp_min(NORM_FLOOR)
    cosine = (token * reference).sum(-1) / norms
    finite = square.isfinite()
    surprise = torch.where(finite & ~cosine.isnan(), 1 - cosine, torch.inf)
    if decay != 0:
        moved = (1 - decay) * reference + decay * token
        ema.copy_(torch.where(finite[..., None], moved, reference))
    return surprise.to(torch.float32)
