"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "MARGINS",
    "ranking_loss",
    "safety_loss",
]


# ---------- chapters/04_reward_model.py · Two losses

MARGINS = {  # of Equation 2 by rating, Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}


def ranking_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, ""]:
    "Mean over pairs of -log σ(chosen - rejected - margin): Equation 1, with a margin Equation 2. ValueError for shapes."
    shapes = {tuple(x.shape) for x in (chosen, rejected, margin) if isinstance(x, Tensor)}
    if len(shapes) > 1 or chosen.ndim != 1:
        raise ValueError(f"scores and margins of shapes {sorted(shapes)}: expected one number for each pair")
    return -F.logsigmoid(chosen - rejected - margin).mean()


def safety_loss(scores: Float[Tensor, "N"], safe: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    "Mean cross-entropy of the scores as logits of 'safe' (1) or not (0); where `safe` is -1 it is unknown (A.3.4; ours)."
    known = safe >= 0
    losses = F.binary_cross_entropy_with_logits(scores, safe.clamp(min=0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)
