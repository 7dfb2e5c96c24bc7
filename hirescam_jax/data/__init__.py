"""Data: volumes, organ regions, the phantom, readers, the store, and the Grain pipeline."""
