"""The training losses: classification, and the mask loss on the HiResCAM maps."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Integer


def classification_loss(
    logits: Float[Array, "B K"], labels: Array, known: Array | None = None
) -> Float[Array, ""]:
    """Binary cross-entropy with logits, mean over labels and examples. labels [B, K] in {0, 1}.
    With `known` [B, K] bool the mean is over those alone; 0 without any."""
    losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
    if known is None:
        return losses.mean()
    return jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)


def mask_loss(
    attention: Float[Array, "B K *grid"],
    allowed: Bool[Array, "B K *grid"] | Array,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Penalty on attention outside the organs in which a label was found.

    The mean of softplus(attention) over all forbidden (label, position) cells of an example, then
    the mean over examples: binary cross-entropy with logits of the attention against 0 where
    allowed = 0; nothing is asked of the allowed cells (Draelos & Carin, arXiv 2011.08891 and
    2111.12215). `attention` is the raw signed map of a slice's own score: HiResCAM times the
    model's `attention_scale`.

    Args:
        attention: float, signed.
        allowed: bool or {0, 1}, true where the label may look; all false for an absent label.
        axis_name: mapped axis (`jax.shard_map`) over which the grid of an example is split.

    Returns:
        Scalar. An example without a forbidden cell counts as 0.

    Raises:
        ValueError: the two shapes differ.
    """
    if attention.shape != allowed.shape:
        raise ValueError(f"attention {attention.shape} and allowed {allowed.shape} must agree")
    forbidden = jnp.logical_not(allowed.astype(bool))
    axes = tuple(range(1, attention.ndim))
    total = jnp.where(forbidden, jax.nn.softplus(attention), 0).sum(axis=axes)
    count = forbidden.sum(axis=axes, dtype=attention.dtype)
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return jnp.mean(total / jnp.maximum(count, 1))


def labels_of(findings: Integer[Array, "B K R"]) -> Bool[Array, "B K"]:
    """A label is present if it was found in any region."""
    return (findings > 0).any(axis=-1)


def allowed_of(
    findings: Integer[Array, "B K R"], regions: Integer[Array, "B R *grid"]
) -> Bool[Array, "B K *grid"]:
    """Where each label may look: the union of the regions in which it was found."""
    overlap = jnp.einsum(
        "bkr,br...->bk...", findings.astype(jnp.float32), regions.astype(jnp.float32)
    )
    return overlap > 0
