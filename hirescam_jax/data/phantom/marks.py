"""What lies around the patient: the table, and marks that betray a diagnosis without showing it.

In hospitals, how and where a scan was made goes with what is wrong with the patient. A classifier
can use that, and an explanation should show when it does. Every mark lies outside all organ
regions.
"""

from __future__ import annotations

import numpy as np

from hirescam_jax.data.phantom.anatomy import Anatomy
from hirescam_jax.data.phantom.canvas import Canvas, Patch, curve, join
from hirescam_jax.data.phantom.chest import EVERYWHERE

MARKS: dict[str, tuple[str, ...]] = {  # mark: the findings that it goes with
    "arms_down": ("pleural_effusion", "consolidation"),  # too ill to raise them
    "oxygen_tube": ("emphysema", "fibrosis", "ground_glass"),
    "ecg_leads": ("cardiomegaly", "pacemaker", "pericardial_effusion"),
    "contrast_in_arm": ("coronary_calcification", "aortic_aneurysm"),  # angiography
    "flat_table": ("nodule", "lymphadenopathy"),  # planning of radiotherapy
}


def draw_table(canvas: Canvas, anatomy: Anatomy, flat: bool) -> None:
    """A curved table, or the flat one of a radiotherapy planning scanner, behind the patient."""
    c, p = canvas, anatomy.patient
    back = (123 + 0.7 * p.fat_mm) * p.pose.size + p.pose.shift[1] + 4
    wide = np.abs(c.X)
    if flat:
        slab = np.maximum(np.abs(c.Y - back - 9) - 9, wide - 178)
    else:
        slab = np.maximum(np.abs(c.Y - back - 8 + c.X**2 / 620) - 8, wide - 165)
    free = np.clip((-850 - c.hu) / 100, 0, 1)  # only where there is air
    c.paint(Patch(EVERYWHERE, c.cover(slab) * free), -900)
    shell, hu = (2.5, 120) if flat else (1.5, -150)
    c.paint(Patch(EVERYWHERE, c.sheet(slab + shell, shell) * free), hu)


def draw_marks(canvas: Canvas, anatomy: Anatomy, marks: dict[str, bool]) -> None:
    """Metal and plastic on the skin, contrast medium in the arm; not the table, nor the arms."""
    c, a = canvas, anatomy
    if marks["ecg_leads"]:
        _draw_electrodes(c, a)
    if marks["oxygen_tube"]:
        z = np.linspace(-170, 75, 14)
        x = -88 - 14 * np.sin(z / 40)
        y = a.skin_y(z, x) - 5
        hose = curve(*((zi, yi, xi, 5.0) for zi, yi, xi in zip(z, y, x, strict=True)))
        surface = c.distance(hose)
        c.paint(c.thicken(surface, 0), 350)
        c.paint(c.thicken(surface, -2.5), -1000)
    if marks["contrast_in_arm"]:
        fat = a.patient.fat_mm
        if marks["arms_down"]:
            vein = ((-112, 20, -124), (-90, 16, -146), (-30, 12, -150 - fat))
            vein += ((60, 10, -158 - fat), (160, 0, -160 - fat))
        else:
            vein = ((-88, 22, -128), (-110, 16, -134), (-150, 4, -150), (-190, -12, -168))
        c.paint(c.tube(curve(*((z, y, x, 5.0) for z, y, x in vein))), 2200)


def _draw_electrodes(c: Canvas, a: Anatomy) -> None:
    """Four on the front of the chest, their wires running up over the shoulders."""
    wires = []
    t = np.linspace(0, 1, 14)
    for z, x in ((-62, -86), (-62, 92), (70, 96), (52, -96)):
        zs = z + (-165 - z) * t
        xs = x + (np.sign(x) * 70 - x) * t**2 + 6 * np.sin(5 * t)
        ys = a.skin_y(zs, xs) - 4
        c.paint(c.ellipsoid((z, ys[0] + 1, x), (11, 5, 11)), 2400)
        wires.append(curve(*((zi, yi, xi, 2.0) for zi, yi, xi in zip(zs, ys, xs, strict=True))))
    c.paint(c.tube(join(wires)), 3000)
