"""Evaluation: how well a run predicts and where it looks, volume by volume, on all devices."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from hirescam_jax.config import measured_alike
from hirescam_jax.data.pipeline import Source, digest_of, findings_of, patients_of
from hirescam_jax.devices import processes
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation import checks
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.result import Evaluation, Guarantee, Head, RunEvaluation
from hirescam_jax.evaluation.resume import Kept
from hirescam_jax.evaluation.summary import Predictions, summarise
from hirescam_jax.evaluation.text import faithfulness_table, table
from hirescam_jax.evaluation.values import Values
from hirescam_jax.explanations.explain import model_verdict
from hirescam_jax.explanations.methods import EVALUATED
from hirescam_jax.files import atomic_file
from hirescam_jax.models.contract import has_slices
from hirescam_jax.runs.run import Run
from hirescam_jax.runs.setup import open_data


def evaluate_to_file(
    run: Run,
    target: Path,
    *,
    split: Literal["test", "val"] = "test",
    faithfulness: int = 0,
    sanity: int = 0,
) -> RunEvaluation:
    """`evaluate_run` on the run's own data, on all processes; the first one writes and prints it.

    Beside `target` go the values of each volume (`Values`, one file a split) and a picture of the
    sanity check. What an interrupted evaluation has measured is kept there, and used again.

    Args:
        target: the JSON file.
        split: val for data without a test split.

    Raises:
        UserError: as `open_data` and `evaluate_run`.
    """
    config = measured_alike(run.config)
    splits = {"val": open_data(config, "val", with_lesions=True)}
    if split == "test":
        try:
            splits["test"] = open_data(config, "test", with_lesions=True)
        except UserError as error:
            raise UserError(f"{error}; to measure the validation split: --split val") from error
    facts = {**run.header.facts(**{n: len(s) for n, s in splits.items()}), "format": "2"}
    facts["step"] = str(run.step)
    facts["content of the splits"] = str(list(map(digest_of, splits.values())))
    processes.agree(facts)
    kept = Kept(target.with_name(f".{target.stem}_batches"), facts)
    values: dict[str, Values] = {}
    result = evaluate_run(
        run,
        splits["val"],
        splits.get("test"),
        faithfulness=faithfulness,
        sanity=sanity,
        kept=kept,
        values=values,
    )

    def write() -> None:
        for name, of_split in values.items():
            of_split.save(target.with_name(f"{target.stem}_{name}.npz"))
        with atomic_file(target) as temporary:
            temporary.write_text(result.to_json())
        print(table(result))
        if result.faithfulness:
            print(f"\n{faithfulness_table(result.faithfulness)}")
        if result.sanity:
            picture = target.with_name(f"{target.stem}_sanity.png")
            checks.save_sanity_picture(picture, result.sanity)
            print(picture)
        print(target)

    processes.on_first(write)
    kept.remove()
    return result


def evaluate_run(
    run: Run,
    validation: Source,
    test: Source | None,
    *,
    faithfulness: int = 0,
    sanity: int = 0,
    kept: Kept | None = None,
    values: dict[str, Values] | None = None,
) -> RunEvaluation:
    """Measures a run on opened splits, and what its head guarantees.

    Args:
        test: None where the data has no test split.
        kept: continue from these results.
        faithfulness, sanity: do these checks (`hirescam_jax.evaluation.checks`) on so many test
            volumes.
        values: to be filled with the values of each volume, by split.

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
        if number and not has_slices(run.model):
            raise UserError(f"--{name}: {type(run.model).__name__} has no maps in the body")
    found: dict[str, Predictions] = {}
    results: dict[str, Evaluation] = {}
    for split, source in splits.items():
        prior = found["validation"].prior if found else None
        found[split] = predict(run, source, f"{split} split", prior, kept)
    for split, source in splits.items():
        patients = patients_of(source)
        content = content_of(source, found[split])
        both = found["validation"], found[split]
        results[split] = dataclasses.replace(
            summarise(run.labels, *both, regions=run.header.regions, patients=patients),
            content=content,
        )
        if values is not None:
            values[split] = Values.of(run.labels, *both, patients, content)
    result = RunEvaluation(
        step=run.step,
        split=main,
        head=_head(run),
        scores=results[main],
        validation=results["validation"] if test is not None else None,
    )
    source = splits[main]
    if faithfulness:
        prior = np.asarray(found["validation"].prior)
        faithful = checks.faithfulness(run, source, prior, faithfulness)
        result = dataclasses.replace(result, faithfulness=faithful)
    if sanity:
        result = dataclasses.replace(result, sanity=checks.sanity(run, source, sanity))
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


def _head(run: Run) -> Head:
    verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    maps = {name: Guarantee(verdict.holds_for(name), verdict.short(name)) for name in EVALUATED}
    return Head(verdict.kind, verdict.text, maps)
