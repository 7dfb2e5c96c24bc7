"""Data: from files as hospitals have them to batches for a train step.

volume.py, grid.py   a CT with its affine, and resampling to a model's grid
study.py             one examination: its files, findings and patient
specs.py             what a config's `data` may be
pipeline.py          a split as a source of examples, and Grain batches of it; read this first
readers/             one reader a data set or file format: a new one goes there
organs/              masks of organs: read, found in a CT, brought to the feature grid
store/               the prepared store on disk
prepare/             raw volumes -> a store
phantom/             procedural chest CTs
lesions/             synthetic lesions in real CTs
"""
