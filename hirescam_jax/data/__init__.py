"""Data: volumes, organ regions, the phantom, prepared folders, and the Grain pipeline."""
