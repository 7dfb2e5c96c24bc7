"""Opening what a config names: data, layout."""

from hirescam_jax.config import Config
from hirescam_jax.data.pipeline import PermutedLabels, Source, open_split
from hirescam_jax.training.step import feature_grid


def open_data(config: Config, split: str, with_lesions: bool = False) -> Source:
    """A split of the config's data with its masks on the feature grid of the config's model; with
    the lesions themselves where the data has them, if they are asked for. The training split has
    permuted labels if the config says so."""
    shape = open_split(config.data, split, (1, 1, 1)).shape
    grid = feature_grid(config.model, shape)
    source = open_split(config.data, split, grid, config.labels, with_lesions)
    permuted = split == "train" and config.permute_labels
    return PermutedLabels(source, config.seed) if permuted else source
