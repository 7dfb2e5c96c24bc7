"""Opening what a config names: data, layout."""

from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import PermutedLabels, Source, open_split
from hirescam_jax.devices.layout import Layout
from hirescam_jax.devices.mesh import DATA, make_mesh
from hirescam_jax.errors import UserError
from hirescam_jax.models.contract import depth_unit, feature_grid, has_slices


def open_data(config: Config, split: str, with_lesions: bool = False) -> Source:
    """A split of the config's data with its masks on the feature grid of the config's model; with
    the lesions themselves where the data has them, if they are asked for. The training split has
    permuted labels if the config says so."""
    shape = open_split(config.data, split, (1, 1, 1)).shape
    grid = feature_grid(config.model, shape)
    source = open_split(config.data, split, grid, config.labels, with_lesions)
    permuted = split == "train" and config.permute_labels
    return PermutedLabels(source, config.seed) if permuted else source


def open_layout(config: Config, shape: tuple[int, ...], *, evaluation: bool = False) -> Layout:
    """How the config's batches of volumes of `shape` lie on all devices of all processes; for
    evaluation, where a last batch is filled up anyway, raised to what the devices can share.

    Raises:
        UserError: a batch or a mesh that does not fit the devices, or settings that need slices for
            a model whose features have none.
    """
    check_slices(config, evaluation)
    mesh = make_mesh(config.depth_devices)
    grid, unit = feature_grid(config.model, shape), depth_unit(config.model) or 1
    if evaluation:
        devices = mesh.shape[DATA]
        return Layout(mesh, -(-config.batch_size // devices) * devices, shape, grid, unit)
    return Layout(mesh, config.batch_size, shape, grid, unit, config.micro_batches)


def check_slices(config: Config, evaluation: bool) -> None:
    """Raises UserError for what needs features of single slices, if the model has none of them."""
    kind, slices = type(config.model).__name__, has_slices(config.model)
    if config.depth_devices > 1 and depth_unit(config.model) is None:
        why = (
            f"{kind} has no `depth_unit`, the number of slices that make one feature cell"
            if slices
            else f"the features of {kind} are of all slices at once"
        )
        raise UserError(
            f"config.depth_devices = {config.depth_devices}: {why}, which therefore stay on one "
            "device: use 1"
        )
    if config.mask_weight > 0 and not slices and not evaluation:
        raise UserError(
            f"config.mask_weight = {config.mask_weight:g}: the features of {kind} have no slices, "
            "so that masks mean nothing on its maps: use 0"
        )
