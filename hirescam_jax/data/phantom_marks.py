"""What lies around the patient: the table, and marks that betray a diagnosis without showing it.

In hospitals, how and where a scan was made goes with what is wrong with the patient. A classifier can use that; an
explanation should show when it does. Every mark lies outside all organ regions.
"""

from __future__ import annotations

import numpy as np

from hirescam_jax.data.phantom_anatomy import Anatomy
from hirescam_jax.data.phantom_canvas import Canvas, Patch, smooth_path

MARKS: dict[str, tuple[str, ...]] = {  # mark: the findings that it goes with
    "arms_down": ("pleural_effusion", "consolidation"),  # too ill to raise them
    "oxygen_tube": ("emphysema", "fibrosis", "ground_glass"),
    "ecg_leads": ("cardiomegaly", "pacemaker", "pericardial_effusion"),
    "contrast_in_arm": ("coronary_calcification", "aortic_aneurysm"),  # angiography
    "flat_table": ("nodule", "lymphadenopathy"),  # planning of radiotherapy
}


def draw_table(canvas: Canvas, anatomy: Anatomy, flat: bool) -> None:
    """A curved table, or the flat one of a radiotherapy planning scanner, just behind the patient."""
    c, p = canvas, anatomy.patient
    back = (123 + 0.7 * p.fat_mm) * p.pose.size + p.pose.shift[1] + 4
    whole = (slice(None), slice(None), slice(None))
    wide = np.abs(c.X)
    if flat:
        slab = np.maximum(np.abs(c.Y - back - 9) - 9, wide - 178)
    else:
        slab = np.maximum(np.abs(c.Y - back - 8 + c.X**2 / 620) - 8, wide - 165)
    free = np.clip((-850 - c.hu) / 100, 0, 1)  # only where there is air
    c.paint(Patch(whole, c.cover(slab) * free), -880)
    c.paint(Patch(whole, c.cover(np.abs(slab + 1.5) - (2.5 if flat else 1.5)) * free), 120 if flat else -150)


def draw_marks(canvas: Canvas, anatomy: Anatomy, marks: dict[str, bool]) -> None:
    """Metal and plastic on the skin and contrast medium in the arm (table and arms are drawn elsewhere)."""
    c, a = canvas, anatomy
    if marks["ecg_leads"]:
        _draw_electrodes(c, a)
    if marks["oxygen_tube"]:
        z = np.arange(-165.0, 75.0, 8.0)
        x = -88 - 14 * np.sin(z / 40)
        y = a.skin_y(z, x) - 5
        c.paint(c.tube(*smooth_path(np.stack([z, y, x], 1), 5.0, 2.0)), 350)
        c.paint(c.tube(*smooth_path(np.stack([z, y, x], 1), 2.5, 1.0)), -1000)
    if marks["contrast_in_arm"]:
        fat = a.patient.fat_mm
        if marks["arms_down"]:
            line = [(-112, 20, -124), (-90, 16, -146), (-30, 12, -150 - fat), (60, 10, -158 - fat), (160, 0, -160 - fat)]
        else:
            line = [(-88, 22, -128), (-110, 16, -134), (-150, 4, -150), (-190, -12, -168)]
        c.paint(c.tube(*smooth_path(line, 5.0, 2.0)), 2200)


def _draw_electrodes(c: Canvas, a: Anatomy) -> None:
    places = np.array([(-62.0, -86), (-62, 92), (70, 96), (52, -96)])
    y = a.skin_y(places[:, 0], places[:, 1])
    for (z, x), skin in zip(places, y, strict=True):
        c.paint(c.ellipsoid((z, skin - 3, x), (11, 5, 11)), 2400)
        count = 14
        zs = np.linspace(z, -165, count)
        xs = x + (np.sign(x) * 70 - x) * np.linspace(0, 1, count) ** 2 + 6 * np.sin(np.linspace(0, 5, count))
        line = np.stack([zs, a.skin_y(zs, xs) - 4, xs], 1)
        c.paint(c.tube(*smooth_path(line, 2.0, 1.5)), 3000)
