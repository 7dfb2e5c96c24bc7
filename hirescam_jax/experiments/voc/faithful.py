"""Does the network use what the maps of photos show? Insertion, deletion and ROAD."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from hirescam_jax.compiling import compiler_options
from hirescam_jax.experiments.voc.maps import BASELINES, METHODS, PairMaps, Pairs, baseline_maps
from hirescam_jax.metrics import blur, deletion, insertion, road
from hirescam_jax.metrics.bootstrap import mean_intervals
from hirescam_jax.progress import progress

STEPS = 16  # of the insertion and deletion curves
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the pixels that ROAD removes
BLUR = 1 / 16  # of the photo's square: standard deviation of where insertion starts
MEASURES = ("insertion", "deletion", "road")


def faithfulness(
    model: Any, variables: Any, images: Any, maps: PairMaps, pairs: Pairs, count: int, seed: int
) -> dict[str, Any]:
    """Areas under the insertion and deletion curves, and ROAD, of `count` pairs that the network
    predicts (probability of 1/2 and more), a random choice, or of all if there are fewer.

    Deletion fills with ImageNet's mean colour, which is 0 here and the padding; insertion starts
    from the blurred photo.

    Args:
        variables: of the whole network.
        images: photo number -> normalised float32 [1, S, S, 3].

    Returns:
        {"pairs", "maps": {map: {measure: interval over photos}}, "gain": of HiResCAM over
        Grad-CAM}; maps as in `compare_maps`.
    """

    def logits(variables: Any, photos: Array) -> Array:
        return model.apply(variables, photos)

    @partial(jax.jit, compiler_options=compiler_options())
    def measure(variables: Any, photo: Array, maps: Array, label: Array, key: Array) -> Any:
        score, labels = Partial(logits, variables), jnp.broadcast_to(label, maps.shape[1:2])
        options: Any = {"labels": labels, "key": key, "chunk": 8}
        start = blur(photo, BLUR * photo.shape[1], 2)
        return {
            "insertion": insertion(score, photo, maps, start=start, steps=STEPS, **options).area,
            "deletion": deletion(score, photo, maps, steps=STEPS, **options).area,
            "road": road(score, photo, maps, fractions=FRACTIONS, **options).combined,
        }

    predicted = np.flatnonzero(maps.logit >= 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(predicted)[:count])
    some = Pairs(pairs.photo[chosen], pairs.label[chosen])
    stacked = [getattr(maps, name)[chosen] for name in METHODS]
    stacked += [baseline_maps(name, maps.hirescam.shape[1:], some, 0) for name in BASELINES]
    maps_PM = np.stack(stacked, axis=1)
    names = (*METHODS, *BASELINES)
    values = {name: np.full((len(names), len(chosen)), np.nan) for name in MEASURES}
    pairs_of = zip(some.photo.tolist(), some.label.tolist(), maps_PM, strict=True)
    title = f"faithfulness of {model.classifier}"
    for row, (photo, label, own) in enumerate(progress(pairs_of, title, "pair", len(chosen))):
        image = images(photo)
        key = jax.random.key(photo)
        found = measure(variables, image, own[None], jnp.asarray(label), key)
        for name, areas in found.items():
            values[name][:, row] = np.asarray(areas)[0]
    by_map = {
        method: {name: values[name][i] for name in MEASURES} for i, method in enumerate(names)
    }
    gain = {name: values[name][0] - values[name][1] for name in MEASURES}
    return {
        "pairs": len(chosen),
        "maps": {method: mean_intervals(of_map, some.photo) for method, of_map in by_map.items()},
        "gain": mean_intervals(gain, some.photo),
    }
