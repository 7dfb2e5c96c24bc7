#!/usr/bin/env bash
# Makes written_before.tar.xz: a store, runs, their evaluation, maps and tables as commit b337e30
# wrote them, before its modules moved into folders. Every later version has to read them
# (test_written_before.py). To be run once, with that commit installed, in an empty folder; a later
# version would write files of its own, which say nothing about the older ones.
#
#     git checkout b337e30 && pip install '.[test]' && bash make_written_before.sh
set -euo pipefail
export JAX_PLATFORMS=cpu
mkdir written_before && cd written_before

# 60 phantom patients, no real ones, on a grid of 6 x 12 x 12 voxels: 1.5 kilobytes each.
hirescam phantom --out phantoms --size 60 --shape 12 12 12 --split train --seed 5
python - <<'PYTHON'
import json
from hirescam_jax.data.phantom import Phantom
numbers = {name: [i + 1] for i, name in enumerate(Phantom.regions)}
json.dump(numbers, open("regions.json", "w"))
json.dump({name: [i + 1] for i, name in enumerate(Phantom.labels)}, open("lesions.json", "w"))
PYTHON
hirescam prepare nifti phantoms --out store --workers 0 --shape 6 12 12 --spacing 50 30 30 \
  --regions phantoms/masks --region-suffix _regions --region-map regions.json \
  --split-fractions 0.3 0.33 0.37

# Config files as users have them: each class, and each field by its name.
cat >config.py <<'PYTHON'
from hirescam_jax.config import Adam, Config, StoreData
from hirescam_jax.models import AxialNet
from hirescam_jax.preprocess import Preprocess

config = Config(
    model=AxialNet(
        num_labels=80,
        blocks=(1,),
        widths=(4,),
        stem="small",
        conv_widths=(4,),
        conv_padding="SAME",
        channels=3,
        pool="mean",
        dtype="float32",
        remat=False,
        block="basic",
    ),
    data=StoreData(
        path="store", mask_method="area", dilate=False, train_size=0, val_size=0, test_size=0
    ),
    preprocess=Preprocess(hu_min=-1000.0, hu_max=800.0, mean=0.449, flip=0.5, rotate=0.5),
    optimizer=Adam(learning_rate=1e-2, weight_decay=1e-4),
    labels=("cardiomegaly", "pleural_effusion", "emphysema"),
    mask_weight=1.0,
    batch_size=6,
    micro_batches=1,
    depth_devices=1,
    epochs=3,
    save_steps=0,
    patience=15,
    workers=0,
    seed=0,
    weights="",
    permute_labels=False,
)
PYTHON
cat >conv3d.py <<'PYTHON'
from hirescam_jax.config import SGD, Config, PhantomData
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import Conv3DNet

config = Config(
    model=Conv3DNet(
        num_labels=80, widths=(2, 2), narrow=(2,), hidden=(4, 3), dropout=0.1, dtype="float32"
    ),
    data=PhantomData(
        phantom=PhantomConfig(
            shape=(29, 27, 27), field_mm=(300.0, 360.0, 360.0), seed=1, confounding=0.5
        ),
        train_size=2,
        val_size=2,
        test_size=2,
        mask_method="nearest",
        dilate=True,
    ),
    optimizer=SGD(learning_rate=1e-3, momentum=0.99, weight_decay=1e-7),
    epochs=1,
)
PYTHON
for model in BodyConv CTNet; do
  case $model in BodyConv) slices=24 width=4 ;; CTNet) slices=6 width=18 ;; esac
  cat >"${model,,}.py" <<PYTHON
from hirescam_jax.config import Adam, Config, PhantomData
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import $model

config = Config(
    model=$model(
        num_labels=80,
        blocks=(1,),
        widths=($width,),
        stem="small",
        conv_widths=(4, 3),
        channels=2,
        hidden=(4, 3),
        dropout=0.5,
        dtype="float32",
        remat=False,
        block="basic",
    ),
    data=PhantomData(PhantomConfig(shape=($slices, 12, 12)), train_size=2, val_size=2, test_size=2),
    optimizer=Adam(),
    mask_weight=0.0,
    epochs=1,
)
PYTHON
done

# Two runs on the store, the second without the mask loss; the first goes on for an epoch in a copy.
hirescam train config.py --run run
hirescam train config.py --run baseline --mask-weight 0
for model in conv3d bodyconv ctnet; do hirescam train "$model.py" --run "$model"; done
cp -r run longer
hirescam train config.py --run longer --resume --epochs 4
hirescam evaluate run --faithfulness 3 --sanity 1
hirescam evaluate baseline
hirescam table run baseline --out tables
hirescam convert run run.safetensors

# Maps of the test split, and of two files; where these have lesions.
hirescam explain run --store store --split test --out maps.zarr
hirescam explain run --store store --split train --labels emphysema --format nifti --out maps_nifti
mkdir files files/masks
for name in $(python -c '
import csv
rows = csv.DictReader(open("phantoms/findings.csv"))
print(*[r["id"] for r in rows if r["emphysema"] == "1" == r["pleural_effusion"]][:2])'); do
  cp "phantoms/$name.nii.gz" files
  cp "phantoms/masks/${name}_"* files/masks
done
hirescam explain run --input files --out explained --no-pictures --labels emphysema,pleural_effusion
hirescam localize explained --masks files/masks --label-map lesions.json --out localized.csv

# What else is to come out again: the voxels and masks of the store, as digests.
python - <<'PYTHON'
import hashlib, json
from hirescam_jax.data.store import Store
found = {}
for split in ("train", "val", "test"):
    store = Store("store", split, (2, 6, 6))
    found[split] = {"digest": store.digest, "ids": list(store.ids), "items": [
        {"volume": hashlib.sha256(item["volume"].astype("<i2").tobytes()).hexdigest(),
         "findings": "".join(map(str, item["findings"].ravel())),
         "regions": "".join(map(str, item["regions"].ravel()))}
        for item in (store[i] for i in range(len(store)))]}
json.dump(found, open("store_content.json", "w"))
PYTHON

# Of the other runs only what they are, and of the longer one how it went on. No picture, no log, one
# checkpoint, and no name of the folder in which this was made: Orbax notes it in a line that it does
# not read.
for model in baseline conv3d bodyconv ctnet; do rm -r $model/checkpoints; done
mv longer/metrics.jsonl longer.jsonl
rm -r phantoms longer run/checkpoints/6
rm -r ./*/tensorboard ./*/*.png tables/*.md tables/*.tex
find run -name commit_success.txt -exec sed -i "s:$PWD/::" {} +
! grep -rlaF -e "$PWD" -e "$HOME" .
cd ..
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -c written_before |
  xz -9e >written_before.tar.xz
ls -l written_before.tar.xz
