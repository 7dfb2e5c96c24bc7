"""Does the network use what the maps of photos show? Insertion, deletion and ROAD."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hirescam_jax.evaluation.checks import AREAS as MEASURES
from hirescam_jax.evaluation.checks import Pair, measure_pairs
from hirescam_jax.evaluation.result import plain
from hirescam_jax.experiments.voc.maps import BASELINES, METHODS, PairMaps, Pairs, baselines_of
from hirescam_jax.metrics.intervals import mean_intervals
from hirescam_jax.models import MobileNetV2
from hirescam_jax.progress import progress


def faithfulness(
    model: MobileNetV2,
    variables: Any,
    images: Callable[[int], Array],
    maps: PairMaps,
    pairs: Pairs,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Areas under the insertion and deletion curves, and ROAD, of `count` pairs that the network
    predicts (probability of 1/2 and more), a random choice, or of all if there are fewer.

    Deletion fills with ImageNet's mean colour, which is 0 here and the padding; insertion starts
    from the blurred photo (`measure_pairs`).

    Args:
        variables: of the whole network.
        images: photo number -> normalised float32 [1, S, S, 3].

    Returns:
        {"pairs", "maps": {map: {measure: interval over photos}}, "gain": of HiResCAM over
        Grad-CAM}; maps as in `compare_maps`.
    """
    predicted = np.flatnonzero(maps.logit >= 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(predicted)[:count])
    some = Pairs(pairs.photo[chosen], pairs.label[chosen])
    baselines = baselines_of(maps.hirescam.shape[1:], some, 0)
    stacked = [getattr(maps, name)[chosen] for name in METHODS]
    maps_PM = np.stack([*stacked, *(baselines[name] for name in BASELINES)], axis=1)
    pairs_of = zip(some.photo.tolist(), some.label.tolist(), maps_PM, strict=True)
    title = f"faithfulness of {model.classifier}"

    def all_pairs() -> Iterator[Pair]:
        for photo, label, own in progress(pairs_of, title, "pair", len(chosen)):
            yield Pair(photo, images(photo), label, own)

    found = measure_pairs(model.apply, variables, all_pairs(), jnp.zeros_like)
    values = {name: found.get(name, np.zeros((0, maps_PM.shape[1]))) for name in MEASURES}
    by_map = {
        method: {name: values[name][:, m] for name in MEASURES}
        for m, method in enumerate((*METHODS, *BASELINES))
    }
    gain = {name: values[name][:, 0] - values[name][:, 1] for name in MEASURES}
    return {
        "pairs": len(chosen),
        "maps": {m: plain(mean_intervals(of_map, some.photo)) for m, of_map in by_map.items()},
        "gain": plain(mean_intervals(gain, some.photo)),
    }
