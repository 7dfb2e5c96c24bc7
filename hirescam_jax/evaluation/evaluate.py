"""Evaluation: how well a run predicts and where it looks, volume by volume, on all devices."""

import hashlib
from typing import Any

import numpy as np

from hirescam_jax.data.pipeline import Source, digest_of, findings_of, patients_of
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.resume import Kept
from hirescam_jax.evaluation.summary import (
    Predictions,
    evaluate,
)
from hirescam_jax.evaluation.values import Values
from hirescam_jax.explanations.explain import model_verdict
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.runs.run import Run


def evaluate_run(
    run: Run,
    validation: Source,
    test: Source | None,
    *,
    faithfulness: int = 0,
    sanity: int = 0,
    kept: Kept | None = None,
    values: dict[str, Values] | None = None,
) -> dict[str, Any]:
    """`evaluate` of a run on opened splits.

    Args:
        test: None where the data has no test split.
        kept: continue from these results.
        faithfulness, sanity: do these checks (`hirescam_jax.evaluation.checks`) on so many test
            volumes.
        values: to be filled with the values of each volume, by split.

    Returns:
        What `evaluate` returns, of the test split, and beside it
        "split": "test", or "validation" without one;
        "content": a digest of the split's volumes, the same for runs that can be compared;
        "head": {"kind", "text": of its `head_verdict`, "maps": {method: {"holds": whether its maps
            account for the score, "text"}}};
        "validation": what `evaluate` returns, and "content", of the validation split. Its
            thresholds are chosen on the same maps, so that its OrganIoU is in-sample. Not with
            "split": "validation", where this holds for the whole.
        "faithfulness", "sanity": where asked for.

    Raises:
        UserError: the data's labels are not those of the run, scores that are not finite numbers,
            or checks on more volumes than the test split has.
    """
    splits = {"validation": validation} | ({"test": test} if test is not None else {})
    main = "test" if test is not None else "validation"
    for source in splits.values():
        if tuple(source.labels) != run.labels:
            raise UserError(f"{run.path}: trained on labels {run.labels}, data has {source.labels}")
    for name, number in (("faithfulness", faithfulness), ("sanity", sanity)):
        size = len(splits[main])
        if not 0 <= number <= size:
            raise UserError(
                f"--{name} {number}: the {main} split has {size} volumes: give at most as many"
            )
        if number and run.model.depth_unit is None:
            raise UserError(f"--{name}: {type(run.model).__name__} has no maps in the body")
    found: dict[str, Predictions] = {}
    results: dict[str, dict[str, Any]] = {}
    for split, source in splits.items():
        prior = found["validation"].prior if found else None
        found[split] = predict(run, source, f"{split} split", prior, kept)
    for split, source in splits.items():
        patients = patients_of(source)
        content = content_of(source, found[split])
        both = found["validation"], found[split]
        measures = evaluate(run.labels, *both, regions=run.header.regions, patients=patients)
        results[split] = {"content": content, **measures}
        if values is not None:
            values[split] = Values.of(run.labels, *both, patients, content)
    result = {"split": main, "head": _head(run), **results[main]}
    if test is not None:
        result["validation"] = results["validation"]
    if faithfulness or sanity:
        from hirescam_jax.evaluation import checks as evaluate_checks

        source = splits[main]
        if faithfulness:
            prior = np.asarray(found["validation"].prior)
            result["faithfulness"] = evaluate_checks.faithfulness(run, source, prior, faithfulness)
        if sanity:
            result["sanity"] = evaluate_checks.sanity(run, source, sanity)
    return result


def content_of(source: Source, found: Predictions | None = None) -> str:
    """A digest of what a split's volumes are: their names and voxels, where the source has a digest
    of them, and else their findings: of `found`, or read one by one."""
    own = digest_of(source).encode()
    if not own:
        numbers = range(len(source))
        findings = found.findings if found else [findings_of(source, i) for i in numbers]
        own = np.ascontiguousarray(findings).tobytes()
    return hashlib.sha256(own).hexdigest()[:16]


def _head(run: Run) -> dict[str, Any]:
    verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    maps = {
        name: {"holds": verdict.holds_for(name), "text": verdict.short(name)} for name in EVALUATED
    }
    return {"kind": verdict.kind, "text": verdict.text, "maps": maps}
