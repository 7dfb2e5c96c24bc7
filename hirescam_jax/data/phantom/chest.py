"""Drawing the normal chest: from an Anatomy to Hounsfield units and organ regions."""

from __future__ import annotations

import dataclasses

import numpy as np

from hirescam_jax.data.phantom.anatomy import HEART_AXES, REGIONS, RIB_PITCH, SIDES, Anatomy
from hirescam_jax.data.phantom.canvas import Canvas, Distance, Patch, Tube, curve, join

EVERYWHERE = (slice(None), slice(None), slice(None))


@dataclasses.dataclass
class Scene:
    """A slab [n, H, W] with the normal chest drawn, and the shapes that the findings refer to."""

    canvas: Canvas
    anatomy: Anatomy
    lung: np.ndarray  # coverage of both lungs
    cage_mm: np.ndarray  # distance to the inner surface of the rib cage
    lung_mm: np.ndarray  # distance to the surface of the lungs, as if the heart were lung
    heart: Patch | None  # coverage of the pericardial sac
    heart_mm: np.ndarray  # distance to the surface of the heart, in heart.where
    labels: np.ndarray  # uint8: 0, or 1 + place in REGIONS


def draw_chest(canvas: Canvas, anatomy: Anatomy, arms_down: bool, masses: list[Tube]) -> Scene:
    """Draw a chest; `masses` widen the mediastinum and push the lungs aside."""
    c, a, p = canvas, anatomy, anatomy.patient
    z, y, x = c.z, c.y, c.x
    cage = a.cage_mm(z, y, x)
    inner = c.cover(cage)
    above = a.above_diaphragm_mm(z, y, x)
    _draw_wall(c, a, cage, arms_down)
    c.paint(Patch(EVERYWHERE, inner), -95)
    _draw_abdomen(c, a, np.maximum(3 - above, cage))
    c.paint(Patch(EVERYWHERE, c.sheet(above - 1.5, 1.5) * inner), 40)  # the diaphragm itself

    lung_mm = a.hemithorax_mm(z, y, x)
    lung = c.cover(lung_mm)
    organs = np.zeros(c.shape, np.float32)
    vessels, airways = c.distance(a.great_vessels, 5.0), c.distance(a.main_airways, 5.0)
    for surface in (vessels, airways, *(c.distance(mass, 5.0) for mass in masses)):
        _merge(organs, c.thicken(surface, 2.5, 5.0))
    heart, heart_mm = _shape_heart(c, a, cage, above)
    _merge(organs, heart)
    lung *= 1 - organs
    c.paint(Patch(EVERYWHERE, lung), p.lung_hu + 0.3 * y + 0.12 * z)
    _draw_bones(c, a, cage)
    if heart is not None:
        _draw_heart(c, a, heart, heart_mm)
    _draw_mediastinum(c, a, vessels)
    _draw_lung_markings(c, a, lung, lung_mm, airways)

    labels = np.zeros(c.shape, np.uint8)
    spine = (y > 52) | ((y - 62) ** 2 + x**2 < 22**2)
    between = (inner > 0.5) & (above < 0) & (z > -128) & (np.abs(x) < 70) & ~spine
    labels[between] = 1 + REGIONS.index("mediastinum")
    if vessels is not None:
        inside = (vessels.mm < 0) & (above[vessels.where] < 0)
        labels[vessels.where][inside] = 1 + REGIONS.index("great_vessels")
    if heart is not None:
        labels[heart.where][heart.alpha > 0.5] = 1 + REGIONS.index("heart")
    lungs = lung > 0.5
    labels[lungs & (x < 2)] = 1 + REGIONS.index("right_lung")
    labels[lungs & (x >= 2)] = 1 + REGIONS.index("left_lung")
    return Scene(c, a, lung, cage, lung_mm, heart, heart_mm, labels)


def _merge(total: np.ndarray, patch: Patch | None, share: np.ndarray | None = None) -> None:
    """total = max(total, patch), the patch limited to the coverage `share`."""
    if patch is not None:
        alpha = patch.alpha if share is None else patch.alpha * share[patch.where]
        np.maximum(total[patch.where], alpha, out=total[patch.where])


def _arm(side: int, fat: float, down: bool) -> Tube:
    if down:
        bend = ((-128, 22, 112, 40), (-95, 26, 150, 40), (-30, 26, 152 + fat, 40))
        bend += ((60, 24, 160 + fat, 37), (160, 14, 165 + fat, 33))
    else:
        bend = ((-100, 34, 112, 36), (-122, 26, 136, 44), (-150, 12, 158, 44), (-190, -5, 178, 40))
    return curve(*((z, y, side * x, r) for z, y, x, r in bend))


def _draw_wall(c: Canvas, a: Anatomy, cage: np.ndarray, arms_down: bool) -> None:
    """Skin, fat, muscles, breasts, arms, shoulder blades and collar bones."""
    p = a.patient
    fat = p.fat_mm
    body = a.body_mm(c.z, c.y, c.x)
    arms = [_arm(side, fat, arms_down) for side in SIDES]
    limbs = [c.distance(arm, 0.4 * fat) for arm in arms]
    skin, flesh = c.cover(body), c.cover(body + 2.2)
    for centre, radii in a.breasts():
        _merge(skin, c.ellipsoid(centre, radii))
        _merge(flesh, c.ellipsoid(centre, [r - 2.2 for r in radii]))
    for limb in limbs:
        _merge(skin, c.thicken(limb, 0.4 * fat))
        _merge(flesh, c.thicken(limb, 0.4 * fat - 2.2))
    c.paint(Patch(EVERYWHERE, skin), 10)
    c.paint(Patch(EVERYWHERE, flesh), -105)
    for (_, y, x), (_, thick, _) in a.breasts():
        c.paint(c.ellipsoid((16, y - 4, x), (28, 0.6 * thick, 32), softness=14), 5, flesh)

    muscle = c.cover(np.maximum(cage - 12, body + 0.75 * fat))
    beneath = c.cover(body + 0.75 * fat + 1)
    for side in SIDES:
        for z, y, x, radii in (
            (-55, -78, 62, (46, 17, 50)),  # pectoral
            (-45, 50, 114, (80, 46, 22)),  # latissimus, serratus, subscapular
            (-10, 101, 30, (170, 17, 27)),  # erector spinae
            (-70, 98, 62, (70, 13, 52)),  # trapezius, infraspinatus
        ):
            _merge(muscle, c.ellipsoid((z, y, side * x), radii), beneath)
    c.paint(Patch(EVERYWHERE, muscle), 52)
    for limb in limbs:
        c.paint(c.thicken(limb, -6), 55, flesh)
    bone = c.distance(join((points, np.full(len(points), 11.5)) for points, _ in arms))
    c.paint(c.thicken(bone, 0), 800 + p.bone_hu)
    c.paint(c.thicken(bone, -4.5), 60)
    for side in SIDES:
        blade = c.ellipsoid((-50, 78, 92 * side), (66, 26, 44))
        if blade is not None:
            plate = c.sheet(cage[blade.where] - 19, 2.5)
            c.paint(Patch(blade.where, blade.alpha * plate), 520 + p.bone_hu)
    collars = c.distance(
        join(
            curve(
                (-92, -74, 20 * s, 7),
                (-108, -66, 55 * s, 6),
                (-120, -38, 96 * s, 6),
                (-126, -6, 124 * s, 6),
            )
            for s in SIDES
        )
    )
    c.paint(c.thicken(collars, 0), 480 + p.bone_hu)
    c.paint(c.thicken(collars, -2.2), 180)


def _draw_bones(c: Canvas, a: Anatomy, cage: np.ndarray) -> None:
    p = a.patient
    voxels, z, y, x = c.select(np.abs(cage - 5.5) < 5 + c.voxel)
    shell = cage.reshape(-1)[voxels] - 5.5
    wide = np.abs(x)
    front, back = np.clip((-y - 20) / 40, 0, 1), np.clip((y - 20) / 40, 0, 1)
    # ribs fall from the spine sideways and forwards; in front their cartilage rises again
    fall = 0.42 * y - 0.30 * np.minimum(wide, 100) * back
    fall += (0.32 * np.maximum(66 - wide, 0) - 0.12 * wide) * front
    phase = (z + fall - p.rib_phase) / RIB_PITCH
    vertical = (phase - np.rint(phase)) * (0.9 * RIB_PITCH)
    oval = np.sqrt((vertical / 6.0) ** 2 + (shell / 4.2) ** 2)
    margin = np.where(y < 0, 62 + 0.8 * wide + 0.3 * (y + 90), 400)  # the lower edge in front
    kept = (z < margin) & (z > a.apex_z(y, x) - 10) & ((wide > 20) | (y < 0))
    cartilage = np.clip((66 - wide) / 14, 0, 1) * front
    marrow = (190 + p.bone_hu) * (1 - cartilage) + (95 + 120 * p.age) * cartilage
    cortex = (760 + p.bone_hu) * (1 - cartilage) + (110 + 260 * p.age) * cartilage
    hu = marrow + (cortex - marrow) * np.minimum(oval, 1) ** 4
    flat = c.hu.reshape(-1)
    flat[voxels] += c.cover((oval - 1) * 4.6) * kept * (hu - flat[voxels])
    _draw_breastbone(c, a, cage)
    _draw_spine(c, a)


def _draw_breastbone(c: Canvas, a: Anatomy, cage: np.ndarray) -> None:
    box = c.box((-12, -80, 0), (74, 50, 32))
    if box is None:
        return
    z, y, x = c.coordinates(box)
    half = np.interp(z, [-84, -62, -50, 20, 50, 60], [27, 22, 15, 19, 12, 5]).astype(np.float32)
    oval = np.sqrt((x / half) ** 2 + ((cage[box] - 7) / 6.5) ** 2)
    shape = np.maximum((oval - 1) * 6.5, np.maximum(-84 - z, z - 58))
    hu = 170 + a.patient.bone_hu + 420 * np.minimum(oval, 1) ** 5
    c.paint(Patch(box, c.cover(shape) * (y < 0)), hu)


def _draw_spine(c: Canvas, a: Anatomy) -> None:
    box = c.box((0, 84, 0), (160, 46, 42))
    if box is None:
        return
    bone = a.patient.bone_hu
    z, y, x = c.coordinates(box)
    y = y - (58 + 8 * np.exp(-(((z + 30) / 70) ** 2))).astype(np.float32)  # kyphosis
    wide = np.abs(x)
    phase = (z - a.patient.rib_phase) / RIB_PITCH
    level = (phase - np.rint(phase)) * RIB_PITCH  # mm below the middle of a vertebra
    waist = 1 + 0.10 * (level / 12) ** 2
    body = np.sqrt((x / (16.5 * waist)) ** 2 + (y / (13.5 * waist)) ** 2)
    disc = c.cover(9.3 - np.abs(level))
    plates = 250 * np.exp(-(((np.abs(level) - 8.3) / 1.2) ** 2))
    ring = np.hypot(x, y - 24)
    lamina = np.maximum(np.abs(ring - 12.5) - 3.2, np.abs(level + 2) - 8)
    process = np.maximum(wide - 3.4, np.abs(level - 0.35 * (y - 34) + 4) - 6)
    process = np.maximum(process, np.abs(y - 44) - 11)
    wings = np.maximum(np.hypot(level + 5, y - 22 - 0.25 * wide) - 4.6, np.abs(wide - 22) - 13)
    arch = np.minimum(np.minimum(lamina, process), wings)
    for shape, hu in (
        (c.cover(arch), 430 + bone),
        (c.cover((body - 1) * 14), 150 + bone + 420 * np.minimum(body, 1) ** 8 + plates),
        (c.cover((body - 1) * 14) * disc, 75),
        (c.cover(ring - 8.8), 25),  # canal
        (c.cover(ring - 5), 40),  # cord
    ):
        c.paint(Patch(box, shape), hu)


def _draw_abdomen(c: Canvas, a: Anatomy, below: np.ndarray) -> None:
    p = a.patient
    inside = c.cover(below)
    liver = 58 + 0.35 * p.contrast_hu
    c.paint(c.ellipsoid((118, -8, -52), (78, 86, 92)), liver, inside)
    c.paint(c.ellipsoid((94, -42, 16), (36, 42, 58)), liver, inside)
    c.paint(c.ellipsoid((112, 44, 84), (46, 34, 24)), 50 + 0.45 * p.contrast_hu, inside)
    c.paint(c.ellipsoid((126, -46, 24), (22, 24, 44)), 35, inside)  # antrum
    centre, radii = (110, -14, 56), (42, 48, 36)
    c.paint(c.ellipsoid(centre, radii), 45, inside)
    gas = c.ellipsoid(centre, [r - 4 for r in radii])
    c.paint(gas, 15, inside)
    if gas is not None:
        level = c.y[:, gas.where[1], gas.where[2]] - centre[1] + 26 - 30 * p.gas
        c.paint(Patch(gas.where, gas.alpha * c.cover(level)), -970, inside)
    veins = join(
        [
            curve((78, 14, -30, 5), (92, 4, -56, 4), (112, -8, -84, 2.5)),
            curve((78, 10, -26, 5), (90, -16, -40, 4), (110, -44, -52, 2.5)),
            curve((112, 8, -34, 5), (116, 14, -64, 4), (122, 22, -96, 2)),
        ]
    )
    c.paint(c.tube(veins), liver - 12 + 0.5 * p.contrast_hu, inside)
    crura = join(curve((84, 46, 9 * side, 6), (155, 46, 10 * side, 9)) for side in SIDES)
    c.paint(c.tube(crura), 50, inside)


def _shape_heart(c: Canvas, a: Anatomy, cage, above) -> tuple[Patch | None, np.ndarray]:
    """The pericardial sac, which rests on the diaphragm, and the distance to the heart's muscle."""
    reach = a.heart_scale * 72 + a.sac_mm
    box = c.box(a.heart_point(30, -18, 10), (reach, reach, reach))
    if box is None:
        return None, np.zeros((0, 0, 0), np.float32)
    distance = a.heart_mm(*c.coordinates(box))
    sac = np.maximum(np.maximum(distance - a.sac_mm, above[box] + 1), cage[box] + 3)
    return Patch(box, c.cover(sac)), distance


def _draw_heart(c: Canvas, a: Anatomy, heart: Patch, distance: np.ndarray) -> None:
    p = a.patient
    box, sac = heart.where, heart.alpha
    fat = p.epicardial_fat_mm
    c.paint(heart, 8)  # fluid; where there is none, fat covers it all
    c.paint(Patch(box, sac * c.cover(distance - fat)), -85)
    c.paint(Patch(box, sac * c.sheet(distance - a.sac_mm + 0.7, 0.7)), 35)  # pericardium
    muscle = sac * c.cover(distance)
    c.paint(Patch(box, muscle), 50 + 0.4 * p.contrast_hu)
    within = np.zeros(c.shape, np.float32)
    within[box] = muscle * c.cover(distance + 2.5)
    blood = 42 + p.contrast_hu
    for centre, radii, axes in (
        ((44, -30, 33), (37, 19, 19), HEART_AXES),  # left ventricle
        ((44, -60, 6), (35, 13, 27), HEART_AXES),  # right ventricle
        ((16, 14, 4), (21, 14, 28), None),  # left atrium
        ((30, -18, -32), (25, 22, 14), None),  # right atrium
    ):
        c.paint(c.ellipsoid(*a.heart_ellipsoid(centre, radii), axes), blood, within)


def _draw_mediastinum(c: Canvas, a: Anatomy, vessels: Distance | None) -> None:
    blood = 42 + a.patient.contrast_hu
    c.paint(c.tube(a.oesophagus), 40)
    c.paint(c.tube(a.other_vessels), blood)
    c.paint(c.thicken(vessels, 1.2), 45)
    c.paint(c.thicken(vessels, 0), blood)


def _draw_lung_markings(
    c: Canvas, a: Anatomy, lung: np.ndarray, lung_mm: np.ndarray, airways: Distance | None
) -> None:
    """Vessels, fissures and airways."""
    blood = 30 + 0.8 * a.patient.contrast_hu
    fade = lung * np.clip((2 - lung_mm) / 12, 0, 1)  # no vessel is seen to reach the pleura
    c.paint(c.tube(a.lung_vessels(0.5 * c.voxel, 0.18 * c.voxel)), blood, fade)
    if c.voxel < 3:  # thinner than coarser grids can show
        oblique = 0.78 * (c.z - 10) + 0.62 * c.y
        c.paint(Patch(EVERYWHERE, c.sheet(oblique, 0.4) * lung), -500)
        c.paint(Patch(EVERYWHERE, c.sheet(c.z + 4, 0.4) * lung * (oblique < 0) * (c.x < 0)), -650)
    tubes = airways, c.distance(a.bronchi, 1.4)
    for tube in tubes:
        c.paint(c.thicken(tube, 1.4), 20)
    for tube in tubes:
        c.paint(c.thicken(tube, 0), -980)
